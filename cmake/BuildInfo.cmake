# What `gingham info` says of the build. Sets GINGHAM_BUILD_INFO, a list of compile definitions.
execute_process(COMMAND git -C "${CMAKE_CURRENT_SOURCE_DIR}" rev-parse --short=12 HEAD OUTPUT_VARIABLE commit
                OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT commit)
  set(commit "unknown")
endif()
set(architectures "")
if(GINGHAM_CUDA)
  string(REPLACE ";" " " architectures "${CMAKE_CUDA_ARCHITECTURES}")
endif()
set(GINGHAM_BUILD_INFO
    GINGHAM_VERSION="${PROJECT_VERSION}"
    GINGHAM_GIT_COMMIT="${commit}"
    "GINGHAM_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\""
    "GINGHAM_CUDA_ARCHITECTURES=\"${architectures}\"")
