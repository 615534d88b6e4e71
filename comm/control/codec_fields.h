// The fields of each message on the wire. Internal to codec.cc, which see.
#pragma once

#include "comm/control/message.capnp.h"
#include "comm/control/message.h"

namespace penstock::codec_fields {

// put() fills a builder. take() fills our struct from an untrusted reader without judging the
// values; it throws kj::Exception on a damaged pointer or when a limit of the reader is passed.
void put(wire::Register::Builder builder, const Register& message);
void put(wire::Registered::Builder builder, const Registered& message);
void put(wire::Heartbeat::Builder builder, const Heartbeat& message);
void put(wire::StartRank::Builder builder, const StartRank& message);
void put(wire::RankReady::Builder builder, const RankReady& message);
void put(wire::BeginTraining::Builder builder, const BeginTraining& message);
void put(wire::StopRanks::Builder builder, const StopRanks& message);
void put(wire::RankExited::Builder builder, const RankExited& message);
void put(wire::StepReport::Builder builder, const StepReport& message);
void put(wire::EvaluationReport::Builder builder, const EvaluationReport& message);
void put(wire::SegmentSaved::Builder builder, const SegmentSaved& message);
void put(wire::SaveFailed::Builder builder, const SaveFailed& message);
void put(wire::CheckpointOutcome::Builder builder, const CheckpointOutcome& message);
void put(wire::SaveInterval::Builder builder, const SaveInterval& message);
void put(wire::PauseRanks::Builder builder, const PauseRanks& message);
void put(wire::WorkerLeaving::Builder builder, const WorkerLeaving& message);
void put(wire::WorkerReleased::Builder builder, const WorkerReleased& message);
void put(wire::CheckHost::Builder builder, const CheckHost& message);
void put(wire::HostChecked::Builder builder, const HostChecked& message);
void put(wire::RankFinished::Builder builder, const RankFinished& message);
void put(wire::LogChunk::Builder builder, const LogChunk& message);
void put(wire::RankHello::Builder builder, const RankHello& message);
void put(wire::RankProgress::Builder builder, const RankProgress& message);
void put(wire::RanksStopped::Builder builder, const RanksStopped& message);
void put(wire::ExpertLoadReport::Builder builder, const ExpertLoadReport& message);
void put(wire::MirrorRanks::Builder builder, const MirrorRanks& message);
void put(wire::RanksMirrored::Builder builder, const RanksMirrored& message);
void put(wire::InspectRanks::Builder builder, const InspectRanks& message);
void put(wire::RanksInspected::Builder builder, const RanksInspected& message);

void take(wire::Register::Reader reader, Register& message);
void take(wire::Registered::Reader reader, Registered& message);
void take(wire::Heartbeat::Reader reader, Heartbeat& message);
void take(wire::StartRank::Reader reader, StartRank& message);
void take(wire::RankReady::Reader reader, RankReady& message);
void take(wire::BeginTraining::Reader reader, BeginTraining& message);
void take(wire::StopRanks::Reader reader, StopRanks& message);
void take(wire::RankExited::Reader reader, RankExited& message);
void take(wire::StepReport::Reader reader, StepReport& message);
void take(wire::EvaluationReport::Reader reader, EvaluationReport& message);
void take(wire::SegmentSaved::Reader reader, SegmentSaved& message);
void take(wire::SaveFailed::Reader reader, SaveFailed& message);
void take(wire::CheckpointOutcome::Reader reader, CheckpointOutcome& message);
void take(wire::SaveInterval::Reader reader, SaveInterval& message);
void take(wire::PauseRanks::Reader reader, PauseRanks& message);
void take(wire::WorkerLeaving::Reader reader, WorkerLeaving& message);
void take(wire::WorkerReleased::Reader reader, WorkerReleased& message);
void take(wire::CheckHost::Reader reader, CheckHost& message);
void take(wire::HostChecked::Reader reader, HostChecked& message);
void take(wire::RankFinished::Reader reader, RankFinished& message);
void take(wire::LogChunk::Reader reader, LogChunk& message);
void take(wire::RankHello::Reader reader, RankHello& message);
void take(wire::RankProgress::Reader reader, RankProgress& message);
void take(wire::RanksStopped::Reader reader, RanksStopped& message);
void take(wire::ExpertLoadReport::Reader reader, ExpertLoadReport& message);
void take(wire::MirrorRanks::Reader reader, MirrorRanks& message);
void take(wire::RanksMirrored::Reader reader, RanksMirrored& message);
void take(wire::InspectRanks::Reader reader, InspectRanks& message);
void take(wire::RanksInspected::Reader reader, RanksInspected& message);

}  // namespace penstock::codec_fields
