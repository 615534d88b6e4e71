# The four ways to declare a target. Sources are always listed one by one.
include(GoogleTest)

# penstock_library(NAME SOURCES … [PUBLIC …] [PRIVATE …])
# Static library penstock_NAME with alias penstock::NAME. PUBLIC: appears in its headers.
function(penstock_library NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(penstock_${NAME} STATIC ${ARG_SOURCES})
  add_library(penstock::${NAME} ALIAS penstock_${NAME})
  target_link_libraries(penstock_${NAME} PUBLIC penstock_options ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
endfunction()

# penstock_binary(NAME SOURCES … DEPS …)
function(penstock_binary NAME)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE penstock_options ${ARG_DEPS})
  install(TARGETS ${NAME} RUNTIME)
endfunction()

# penstock_test(NAME SOURCES … DEPS … LABELS fast|sim|multiprocess|gpu [TIMEOUT seconds])
# One GoogleTest executable; every TEST in it is a CTest of its own.
function(penstock_test NAME)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  if(PENSTOCK_SANITIZE)  # everything takes several times as long
    math(EXPR ARG_TIMEOUT "4 * ${ARG_TIMEOUT}")
  endif()
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE penstock_options ${ARG_DEPS} GTest::gtest GTest::gtest_main)
  # The list of tests is read when ctest runs, so that a build never executes anything.
  gtest_discover_tests(${NAME} DISCOVERY_MODE PRE_TEST TEST_PREFIX ${NAME}.
    PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/ops/tsan.supp")
endfunction()
