# What `gingham info` says of the build. Sets GINGHAM_BUILD_INFO, a list of compile definitions.
# The commit is that of these sources, not of another repository that a release of them was unpacked in.
set(commit "")
execute_process(COMMAND git -C "${CMAKE_CURRENT_SOURCE_DIR}" rev-parse --show-cdup RESULT_VARIABLE outside
                OUTPUT_VARIABLE way_up OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if("${outside}" STREQUAL "0" AND "${way_up}" STREQUAL "")
  execute_process(COMMAND git -C "${CMAKE_CURRENT_SOURCE_DIR}" --no-optional-locks describe --always --abbrev=12
                          --exclude=* --dirty OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
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
