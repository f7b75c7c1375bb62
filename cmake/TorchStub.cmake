# Two empty libraries with the names of torch's own. Linking to them records that libgingham_torch.so needs libtorch.so and
# libtorch_cpu.so; at load time these are the ones of the torch that is already imported.
file(WRITE "${CMAKE_BINARY_DIR}/torch_stub/empty.c" "")
add_library(torch_stub INTERFACE)
foreach(name torch torch_cpu)
  add_library(stub_${name} SHARED "${CMAKE_BINARY_DIR}/torch_stub/empty.c")
  set_target_properties(stub_${name} PROPERTIES OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY
                                                                    "${CMAKE_BINARY_DIR}/torch_stub")
  target_link_libraries(torch_stub INTERFACE stub_${name})
endforeach()
target_link_options(torch_stub INTERFACE -Wl,--no-as-needed)
