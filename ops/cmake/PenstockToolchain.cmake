# Compiler settings that hold for every target, and the sanitizer switch.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, Debug or RelWithDebInfo" FORCE)
endif()

set(PENSTOCK_SANITIZE "" CACHE STRING "address (with undefined) or thread; empty for none")
option(PENSTOCK_CUDA "Build kernels/cuda and tests/gpu; needs the CUDA toolkit" OFF)
option(PENSTOCK_FUZZ "Build the fuzzers of tests/fuzz; needs clang and PENSTOCK_SANITIZE=address" OFF)

include(CTest)

add_library(penstock_options INTERFACE)
target_include_directories(penstock_options INTERFACE ${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR})
# -ffp-contract=off: the same sum must give the same bits in every translation unit; kernels ask for
# fused multiply-add explicitly, through intrinsics.
# GCC 12 invents findings of these four kinds inside inlined std::string and std::vector code (GCC bugs 105651,
# 105562, 105329); what they are meant to find, the sanitizer presets do find.
target_compile_options(penstock_options INTERFACE -Wall -Wextra -Werror -Wno-restrict
  -Wno-maybe-uninitialized -Wno-stringop-overflow -Wno-stringop-overread -ffp-contract=off)
# Contracts hold in every build: release turns off assertions of third-party code, PENSTOCK_CHECK stays.

# Sanitized code is built with -O1 -g1: half the compile time, the same findings and line numbers.
if(PENSTOCK_SANITIZE)
  target_compile_options(penstock_options INTERFACE -O1 -g1 -fno-omit-frame-pointer)
endif()
if(PENSTOCK_SANITIZE STREQUAL "address")
  target_compile_options(penstock_options INTERFACE
    -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  target_link_options(penstock_options INTERFACE -fsanitize=address,undefined)
elseif(PENSTOCK_SANITIZE STREQUAL "thread")
  target_compile_options(penstock_options INTERFACE -fsanitize=thread -Wno-tsan)
  target_link_options(penstock_options INTERFACE -fsanitize=thread)
elseif(PENSTOCK_SANITIZE)
  message(FATAL_ERROR "PENSTOCK_SANITIZE must be address, thread or empty, not ${PENSTOCK_SANITIZE}")
endif()

if(PENSTOCK_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "PENSTOCK_FUZZ needs clang, whose libFuzzer it links: use the preset fuzz")
  endif()
  # clang does not know the names of the GCC warnings above, and has others, which stay warnings.
  target_compile_options(penstock_options INTERFACE -fsanitize=fuzzer-no-link -Wno-unknown-warning-option
    -Wno-error)
endif()

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()
