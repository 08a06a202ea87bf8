# `cmake --build . --target deploy` collects in deploy/ all that another machine needs: the command, the library, and
# the libraries that are not part of every system. They find each other by $ORIGIN; copy the folder as it is.

set(deploy_folder "${CMAKE_CURRENT_BINARY_DIR}/deploy")
set(deployed_files $<TARGET_FILE:llama_runner> $<TARGET_FILE:llama_runner_shared>)
foreach(target IN LISTS LLAMA_RUNNER_EXECUTORCH)
  get_target_property(type ${target} TYPE)
  get_target_property(imported ${target} IMPORTED)
  if(imported AND type STREQUAL "SHARED_LIBRARY")
    list(APPEND deployed_files $<TARGET_FILE:${target}>)
  endif()
endforeach()

add_custom_target(
  deploy
  COMMAND ${CMAKE_COMMAND} -E rm -rf "${deploy_folder}"
  COMMAND ${CMAKE_COMMAND} -E make_directory "${deploy_folder}"
  COMMAND ${CMAKE_COMMAND} -E copy ${deployed_files} "${deploy_folder}"
  COMMAND
    ${CMAKE_COMMAND} -DFOLDER=${deploy_folder} "-DLIBRARIES=${LLAMA_RUNNER_pcre2_8};${LLAMA_RUNNER_utf8proc}"
    -DSTRIP=${CMAKE_STRIP} -DREADELF=${CMAKE_READELF} -P "${CMAKE_CURRENT_LIST_DIR}/collect.cmake"
  DEPENDS llama_runner llama_runner_shared
  VERBATIM)
