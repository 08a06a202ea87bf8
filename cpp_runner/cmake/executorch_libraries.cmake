# Sets LLAMA_RUNNER_EXECUTORCH to the ExecuTorch targets to link, once find_package(executorch) has found a wheel, whose
# targets are namespaced, or a source install. Also used by the installed package.

if(TARGET executorch::runtime)
  set(LLAMA_RUNNER_EXECUTORCH executorch::runtime)
  foreach(component kernels_optimized kernels_quantized backend_xnnpack threadpool)
    if(TARGET executorch::${component})
      list(APPEND LLAMA_RUNNER_EXECUTORCH executorch::${component})
    endif()
  endforeach()
else()
  set(LLAMA_RUNNER_EXECUTORCH executorch extension_data_loader)
  foreach(component optimized_native_cpu_ops_lib quantized_ops_lib xnnpack_backend extension_threadpool)
    if(TARGET ${component})
      list(APPEND LLAMA_RUNNER_EXECUTORCH ${component})
    endif()
  endforeach()
endif()
