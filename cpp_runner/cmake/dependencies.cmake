# Where the libraries come from. ExecuTorch: executorch_DIR, or the wheel beside LLAMA_RUNNER_PYTHON. SentencePiece:
# LLAMA_RUNNER_SENTENCEPIECE, or its source archive, fetched by pip. The others are packages of the system.

set(LLAMA_RUNNER_DOWNLOADS "${CMAKE_CURRENT_SOURCE_DIR}/../build/third_party" CACHE PATH "where pip's downloads go")
set(LLAMA_RUNNER_SENTENCEPIECE "" CACHE PATH "SentencePiece's C++ source, the folder with its CMakeLists.txt")

set(venv_python "${CMAKE_CURRENT_SOURCE_DIR}/../.venv/bin/python")
if(NOT EXISTS "${venv_python}")
  set(venv_python python3)
endif()
set(LLAMA_RUNNER_PYTHON "${venv_python}" CACHE FILEPATH "the Python that executorch is installed in")

function(pip_download archive)
  file(GLOB found "${LLAMA_RUNNER_DOWNLOADS}/${archive}")
  if(found)
    return()
  endif()
  message(STATUS "Fetching ${archive}")
  execute_process(
    COMMAND ${LLAMA_RUNNER_PYTHON} -m pip download --quiet --no-deps --dest "${LLAMA_RUNNER_DOWNLOADS}" ${ARGN}
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "pip could not fetch ${archive}; see its message above")
  endif()
endfunction()

# ExecuTorch

if(NOT executorch_DIR AND NOT ANDROID)
  execute_process(
    COMMAND
      ${LLAMA_RUNNER_PYTHON} -c
      "import importlib.util as u, importlib.metadata as m
print(u.find_spec('executorch').submodule_search_locations[0], m.version('executorch'), sep=';')"
    OUTPUT_VARIABLE wheel
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${LLAMA_RUNNER_PYTHON} has no executorch; install it, or give -Dexecutorch_DIR")
  endif()
  list(GET wheel 1 executorch_version)
  list(GET wheel 0 wheel)
  if(CMAKE_CROSSCOMPILING)
    set(archive "executorch-${executorch_version}-*_${CMAKE_SYSTEM_PROCESSOR}.whl")
    pip_download(
      "${archive}" --only-binary=:all: --platform manylinux_2_28_${CMAKE_SYSTEM_PROCESSOR}
      executorch==${executorch_version})
    file(GLOB archive "${LLAMA_RUNNER_DOWNLOADS}/${archive}")
    set(wheel "${LLAMA_RUNNER_DOWNLOADS}/${CMAKE_SYSTEM_PROCESSOR}-${executorch_version}")
    if(NOT EXISTS "${wheel}/executorch")
      file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${wheel}")
    endif()
    set(wheel "${wheel}/executorch")
  endif()
  set(executorch_DIR "${wheel}/lib/cmake/executorch" CACHE PATH "folder of executorch-config.cmake")
endif()
find_package(executorch REQUIRED)
include("${CMAKE_CURRENT_LIST_DIR}/executorch_libraries.cmake")
if(TARGET extension_threadpool)
  add_compile_definitions(ET_USE_THREADPOOL)
endif()

# SentencePiece

if(NOT LLAMA_RUNNER_SENTENCEPIECE)
  set(sentencepiece_version 0.2.1)
  pip_download(sentencepiece-${sentencepiece_version}.tar.gz --no-binary :all: sentencepiece==${sentencepiece_version})
  set(sentencepiece_archive "${LLAMA_RUNNER_DOWNLOADS}/sentencepiece-${sentencepiece_version}.tar.gz")
  file(SHA256 "${sentencepiece_archive}" digest)
  if(NOT digest STREQUAL 8138cec27c2f2282f4a34d9a016e3374cd40e5c6e9cb335063db66a0a3b71fad)
    message(FATAL_ERROR "${sentencepiece_archive} is damaged; delete it and configure again")
  endif()
  set(LLAMA_RUNNER_SENTENCEPIECE "${LLAMA_RUNNER_DOWNLOADS}/sentencepiece-${sentencepiece_version}/sentencepiece")
  if(NOT EXISTS "${LLAMA_RUNNER_SENTENCEPIECE}/CMakeLists.txt")
    file(ARCHIVE_EXTRACT INPUT "${sentencepiece_archive}" DESTINATION "${LLAMA_RUNNER_DOWNLOADS}")
  endif()
endif()
set(SPM_ENABLE_SHARED OFF)
set(SPM_ENABLE_TCMALLOC OFF)
set(SPM_DISABLE_EMBEDDED_DATA ON)
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
add_subdirectory("${LLAMA_RUNNER_SENTENCEPIECE}" sentencepiece EXCLUDE_FROM_ALL SYSTEM)
target_compile_options(sentencepiece-static PRIVATE ${LLAMA_RUNNER_ARCHIVED})
add_library(llama_runner_sentencepiece INTERFACE)
target_link_libraries(llama_runner_sentencepiece INTERFACE sentencepiece-static)
target_include_directories(
  llama_runner_sentencepiece SYSTEM
  INTERFACE "${LLAMA_RUNNER_SENTENCEPIECE}/src" "${LLAMA_RUNNER_SENTENCEPIECE}/third_party/protobuf-lite")

# Header-only: nlohmann-json, CLI11, xxHash. Copied out of the system's folder, which a cross compiler must not see.

add_library(llama_runner_headers INTERFACE)
target_include_directories(llama_runner_headers SYSTEM INTERFACE "${CMAKE_CURRENT_BINARY_DIR}/headers")
foreach(header nlohmann/json.hpp CLI/CLI.hpp xxhash.h)
  string(MAKE_C_IDENTIFIER "LLAMA_RUNNER_${header}_DIR" variable)
  find_path(${variable} ${header} REQUIRED NO_CMAKE_FIND_ROOT_PATH)
  string(REGEX REPLACE "/.*" "" copied "${header}")
  file(COPY "${${variable}}/${copied}" DESTINATION "${CMAKE_CURRENT_BINARY_DIR}/headers")
endforeach()

# PCRE2 and utf8proc

add_library(llama_runner_text INTERFACE)
foreach(library pcre2-8 utf8proc)
  string(MAKE_C_IDENTIFIER "LLAMA_RUNNER_${library}" variable)
  find_library(${variable} ${library} REQUIRED)
  find_path(${variable}_include NAMES ${library}.h pcre2.h REQUIRED)
  target_link_libraries(llama_runner_text INTERFACE "${${variable}}")
  if(NOT ${variable}_include STREQUAL "/usr/include")
    target_include_directories(llama_runner_text SYSTEM INTERFACE "${${variable}_include}")
  endif()
endforeach()
