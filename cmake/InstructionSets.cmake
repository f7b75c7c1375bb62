# Compiles a source once per instruction set, each copy in a namespace of its own (see csrc/cpu/dispatch.h).
set(GINGHAM_INSTRUCTION_SETS baseline)
set(GINGHAM_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND GINGHAM_INSTRUCTION_SETS avx2 avx512 avx512_bf16 amx)
  set(GINGHAM_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(GINGHAM_FLAGS_avx512 ${GINGHAM_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set(GINGHAM_FLAGS_avx512_bf16 ${GINGHAM_FLAGS_avx512} -mavx512bf16)
  set(GINGHAM_FLAGS_amx ${GINGHAM_FLAGS_avx512_bf16} -DGINGHAM_TILES)
endif()

function(gingham_add_for_each_instruction_set target source)
  get_filename_component(name ${source} NAME_WE)
  foreach(isa IN LISTS GINGHAM_INSTRUCTION_SETS)
    set(object ${name}_${isa})
    add_library(${object} OBJECT ${source})
    target_include_directories(${object} PRIVATE csrc/include csrc/cpu)
    target_compile_definitions(${object} PRIVATE GINGHAM_ISA=${isa})
    # -O3 in every build type: at -O0 inline functions of the standard library would be shared between instruction sets.
    # With sanitizers, where -O3 takes very long to compile, the least that inlines them.
    # No exceptions: the kernels throw none, and the code that would clean up after one refers to shared symbols.
    target_compile_options(${object} PRIVATE "$<IF:$<BOOL:${GINGHAM_SANITIZE}>,-O1;-finline-small-functions,-O3>"
                                             -fno-exceptions -fno-math-errno -fno-trapping-math -ffp-contract=fast
                                             -Wno-psabi ${GINGHAM_FLAGS_${isa}})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()
