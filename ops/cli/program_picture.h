// Programs as a picture: one row per pipeline rank, time from left to right, a cell per pass.
//
//   rank 0  F0F1F2FabaWaFbF3Bb==..FcB0==Bc--..FdB1==Bd--b2W2b3W3   7.7%
//
// A cell is the pass's letter (F forward, B backward, b its input part, W its weight part) and the
// micro-batch's: digits in direction 0, letters in direction 1, again from the first after the
// last. An overlapped pair is a forward and a backward filled up with '='. Right: the rank's idle
// share. With colour a pass has one, direction 1 in a lighter shade, and cells that are too narrow
// for two characters leave the first away. Pure.
#pragma once

#include <string>
#include <vector>

#include "coordinator/plan/virtual_time.h"

namespace penstock {

struct PictureStyle {
  int columns = 0;  // of the terminal; 0: no limit. A step that needs more goes on below itself
  bool colour = false;
};

// The rows, a ruler of seconds, and a line that explains the cells. REQUIRES: `timeline` is of the
// `kind` of these programs.
std::string draw_programs(const ParallelismSpec& parallelism, const std::vector<Program>& programs,
                          ProgramKind kind, const Timeline& timeline, const PictureStyle& style);

}  // namespace penstock
