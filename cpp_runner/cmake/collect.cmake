# Finishes a deploy folder: adds the libraries in LIBRARIES under the names that the binaries ask for, and strips ours.

foreach(library IN LISTS LIBRARIES)
  if(NOT library MATCHES "\\.so")
    continue()
  endif()
  file(REAL_PATH "${library}" file)
  execute_process(COMMAND ${READELF} -d "${file}" OUTPUT_VARIABLE dynamic COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "SONAME[^[]*\\[([^]]*)\\]" found "${dynamic}")
  file(COPY_FILE "${file}" "${FOLDER}/${CMAKE_MATCH_1}")
endforeach()
execute_process(
  COMMAND ${STRIP} "${FOLDER}/llama_runner" "${FOLDER}/libllama_runner.so" COMMAND_ERROR_IS_FATAL ANY)
