// Reads a rank's flight record (comm/run/flight_record.h) from its file while the rank may write.
#pragma once

#include "comm/base/file.h"
#include "comm/run/flight_record.h"

namespace penstock {

// What the file says now. kDataLoss when it is none, or none of this version; kUnavailable when it
// changed each time it was looked at: its rank is busy.
Result<FlightRecord> read_flight_record(const Path& path);

}  // namespace penstock
