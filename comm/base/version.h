// The version of everything built from this tree; equal to project(VERSION) in CMakeLists.txt.
#pragma once

namespace penstock {

inline constexpr const char* kVersion = "0.1.0";

}  // namespace penstock
