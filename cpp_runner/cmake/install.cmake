# `cmake --install build/host --prefix FOLDER` installs the command, the C library with llama_runner.h, and the C++ library
# as a package for find_package(llama_runner).

include(CMakePackageConfigHelpers)
set(package_folder "${CMAKE_INSTALL_LIBDIR}/cmake/llama_runner")

# The operator's objects as an archive of their own, which the package links as a whole.
add_library(llama_runner_operator STATIC $<TARGET_OBJECTS:llama_runner_kernels>)

set_target_properties(
  llama_runner llama_runner_shared
  PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}" INSTALL_RPATH_USE_LINK_PATH ON)
install(TARGETS llama_runner llama_runner_shared llama_runner_core llama_runner_operator)
install(
  FILES $<TARGET_FILE:sentencepiece-static>
  DESTINATION "${CMAKE_INSTALL_LIBDIR}"
  RENAME libllama_runner_sentencepiece.a)
install(DIRECTORY include/ DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")

configure_package_config_file(
  "${CMAKE_CURRENT_LIST_DIR}/llama_runner-config.cmake.in" "${CMAKE_CURRENT_BINARY_DIR}/llama_runner-config.cmake"
  INSTALL_DESTINATION "${package_folder}"
  PATH_VARS CMAKE_INSTALL_LIBDIR CMAKE_INSTALL_INCLUDEDIR)
write_basic_package_version_file(
  "${CMAKE_CURRENT_BINARY_DIR}/llama_runner-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(
  FILES "${CMAKE_CURRENT_BINARY_DIR}/llama_runner-config.cmake"
        "${CMAKE_CURRENT_BINARY_DIR}/llama_runner-config-version.cmake"
        "${CMAKE_CURRENT_LIST_DIR}/executorch_libraries.cmake"
  DESTINATION "${package_folder}")
