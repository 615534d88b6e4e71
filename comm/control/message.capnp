# The control plane's wire format, one message per frame. Meaning, bounds and who repeats what are
# also in message.h, whose structs these mirror one to one; codec.cc converts and message_check.cc
# enforces every rule.
#
# Evolution: fields and union members are only ever added, at the end; numbers are never reused. A
# peer of another Register.protocolVersion is refused by the coordinator.
# Common rules: job and epoch are never 0; rank >= 0; a receiver drops a message whose epoch is
# below its own.

@0x84dcd880e2b2a28b;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("penstock::wire");

struct ControlMessage {
  # The root of every frame. An unknown member is refused, and counted.
  union {
    register          @0 :Register;
    registered        @1 :Registered;
    heartbeat         @2 :Heartbeat;
    startRank         @3 :StartRank;
    rankReady         @4 :RankReady;
    beginTraining     @5 :BeginTraining;
    stopRanks         @6 :StopRanks;
    rankExited        @7 :RankExited;
    stepReport        @8 :StepReport;
    evaluationReport  @9 :EvaluationReport;
    segmentSaved      @10 :SegmentSaved;
    saveFailed        @11 :SaveFailed;
    checkpointOutcome @12 :CheckpointOutcome;
    rankFinished      @13 :RankFinished;
    logChunk          @14 :LogChunk;
    rankHello         @15 :RankHello;
    rankProgress      @16 :RankProgress;
    ranksStopped      @17 :RanksStopped;
    expertLoadReport  @18 :ExpertLoadReport;
    saveInterval      @19 :SaveInterval;
    inspectRanks      @20 :InspectRanks;
    ranksInspected    @21 :RanksInspected;
    pauseRanks        @22 :PauseRanks;
    workerLeaving     @23 :WorkerLeaving;
    workerReleased    @24 :WorkerReleased;
    checkHost         @25 :CheckHost;
    hostChecked       @26 :HostChecked;
    mirrorRanks       @27 :MirrorRanks;
    ranksMirrored     @28 :RanksMirrored;
  }
}

struct RankStatus {
  # One running rank process, as its daemon sees it. A rank that ended is simply absent.
  job   @0 :UInt64;
  epoch @1 :UInt32;
  rank  @2 :Int32;
  state @3 :RankState;
  step  @4 :Int64;     # last finished; 0 before the first
  timedSteps  @5 :Int64;    # >= 0; of these, added up since the rank began:
  busySeconds @6 :Float64;  # computing; finite, >= 0
  waitSeconds @7 :Float64;  # for other ranks; finite, >= 0
}

enum RankState {
  starting @0;  # spawned, loading
  ready    @1;  # loaded, waiting for BeginTraining
  training @2;
  finished @3;  # every step done, process about to exit
}

struct Register {
  # Worker -> coordinator. First message of every connection, repeated until answered by
  # Registered.
  protocolVersion @0 :UInt32;
  name            @1 :Text;            # host-unique, stable over restarts; no control characters
  incarnation     @2 :UInt64;          # new for each daemon process, never 0
  host            @3 :Text;
  deviceCount     @4 :Int32;           # >= 1
  deviceKind      @5 :Text;            # "cpu" or the GPU's name
  httpAddress     @6 :Text;            # host:port of /metrics
  ranks           @7 :List(RankStatus);  # the whole truth: what is absent does not run there
  statePlace      @8 :StatePlace;      # where it takes in copies of ranks' state; or nowhere
  sequence        @9 :UInt64;          # >= 1; counts with those of Heartbeat; older is dropped
  challenge       @10 :UInt64;         # of the newest Registered that had one; 0: none had
}

struct Registered {
  # Coordinator -> worker, in answer to each Register and Heartbeat. Loss-tolerant: both are
  # repeated.
  worker              @0 :UInt64;  # the same for the same name; 0: unknown here, register again
  heartbeatIntervalMs @1 :Int64;   # 1 .. 3600000 unless refused
  refusal             @2 :Text;    # not empty: the daemon prints it and exits
  leaseMs             @3 :Int64;   # 0 .. 3600000; ranks end so long after it last heard; 0: never
  heardSequence       @4 :UInt64;  # the Heartbeat this answers; 0: a Register
  challenge           @5 :UInt64;  # 0, or with worker 0: to be repeated in the next Register
}

struct Heartbeat {
  # Worker -> coordinator. Loss-tolerant: the newest wins, nothing is resent.
  worker      @0 :UInt64;            # given by Registered
  incarnation @1 :UInt64;
  sequence    @2 :UInt64;            # strictly increasing per incarnation; repeats dropped
  ranks       @3 :List(RankStatus);  # as in Register
  sentAtNs    @4 :Int64;             # the worker's wall clock; 0: unknown
}

struct StartRank {
  # Coordinator -> worker -> rank. Idempotent per (job, epoch, rank); repeated by the coordinator
  # when the worker re-registers without that rank. Stops every rank of lower epochs of the job on
  # that worker.
  job                 @0 :UInt64;
  epoch               @1 :UInt32;
  rank                @2 :Int32;
  device              @3 :Int32;    # index on that worker, >= 0
  specJson            @4 :Text;     # canonical job spec, 1 byte .. 1 MiB
  program             @5 :Program;
  checkpointDir       @6 :Text;     # absolute
  restoreManifest     @7 :Text;     # absolute; empty: initial weights
  restoreStep         @8 :Int64;    # >= 0; 0 without a manifest, unless fromMemory
  firstUnreportedStep @9 :Int64;    # >= 0; lower steps were recorded by an earlier attempt
  seats               @10 :List(LayerSeats);  # each layer once; at most 1 Mi seats in all
  saveInterval        @11 :Int64;             # >= 0; as in SaveInterval; 0: as the spec says
  fromMemory          @12 :Bool;              # restoreStep is held by the daemon; then no manifest
  savedStep           @13 :Int64;             # >= 0; of the newest committed checkpoint; 0: none
  leftOut             @14 :List(StepRange);   # steps that change nothing; at most 1 Mi
  stateFrom           @15 :StatePlace;        # fromMemory: of whom the state is to be fetched
}

struct StatePlace {
  # A daemon that keeps, or is to keep, a copy of a rank's state (comm/control/state_stream.h).
  address @0 :Text;    # host:port; empty: nowhere
  keyLow  @1 :UInt64;  # the daemon's own, which it gave to the coordinator
  keyHigh @2 :UInt64;
}

struct StepRange {
  first @0 :Int64;  # >= 1
  last  @1 :Int64;  # >= first
}

struct LayerSeats {
  # Where the routed experts of one layer are in every expert group. A layer that is not listed has
  # expert e on seat e.
  layer   @0 :Int32;         # as in model.layers.N, >= 0
  experts @1 :List(UInt16);  # by seat: each of 0 .. size - 1 once
}

struct Program {
  # One pipeline rank's instructions for one step.
  pipelineIndex @0 :Int32;              # >= 0
  training      @1 :List(Instruction);  # at most 1 Mi
  evaluation    @2 :List(Instruction);  # at most 1 Mi
  resized       @3 :List(ResizedTraining);  # at most 64
}

struct ResizedTraining {
  # The training step of another number of micro-batches.
  microbatches @0 :Int32;              # >= 1; ascending in the list
  training     @1 :List(Instruction);  # at most 1 Mi
}

struct Instruction {
  op                 @0 :Op;
  direction          @1 :UInt8;  # 0 or 1
  microbatch         @2 :Int32;  # -1: none applies
  backwardDirection  @3 :UInt8;  # 0 or 1; overlapped only
  backwardMicrobatch @4 :Int32;  # -1: none applies; overlapped only
  peer               @5 :Int32;  # pipeline rank, -1: none applies
}

enum Op {
  receiveForward  @0;
  forward         @1;
  sendForward     @2;
  receiveBackward @3;
  backward        @4;
  backwardInput   @5;
  backwardWeight  @6;
  sendBackward    @7;
  overlapped      @8;
  reduceGradients @9;
  optimizerStep   @10;
}

struct RankReady {
  # Rank -> daemon -> coordinator. Sent again after re-registration; idempotent.
  job     @0 :UInt64;
  epoch   @1 :UInt32;
  rank    @2 :Int32;
  address @3 :Data;    # of its data plane, opaque, at most 64 KiB
  data    @4 :List(DataIdentity);  # training, then validation sources; at most 2048
}

struct DataIdentity {
  # One data set, as the rank found it.
  path       @0 :Text;    # prefix of its files, never empty
  tokens     @1 :Int64;   # >= 0
  digestLow  @2 :UInt64;  # XXH3-128; of what: worker/data/indexed_dataset.h
  digestHigh @3 :UInt64;
}

struct BeginTraining {
  # Coordinator -> workers -> ranks, once every rank is ready. Idempotent per (job, epoch).
  job       @0 :UInt64;
  epoch     @1 :UInt32;
  addresses @2 :List(Data);  # by rank, never empty
}

struct StopRanks {
  # Coordinator -> worker: end every rank of this job up to and including the epoch, and refuse to
  # start any. Acknowledges the RankExited of those epochs. Idempotent.
  job     @0 :UInt64;
  epoch   @1 :UInt32;
  graceMs @2 :Int64;   # 0 .. 3600000, between SIGTERM and SIGKILL; 0: SIGKILL at once
  reason  @3 :Text;
  keepState @4 :Bool;  # what is held in memory of its ranks stays, and is told; else it goes
}

struct RankExited {
  # Daemon -> coordinator: a rank process ended. Repeated until StopRanks of its epoch or a newer
  # epoch.
  job      @0 :UInt64;
  epoch    @1 :UInt32;
  rank     @2 :Int32;
  exitCode @3 :Int32;  # 0 .. 255; -1 exactly when a signal ended it
  signal   @4 :Int32;  # 0 .. 64
  reason   @5 :Text;   # one sentence: how it ended and, if it said, why
  logTail  @6 :Data;   # the last lines of its stderr, at most 2 KiB; any bytes
}

struct StepReport {
  # Rank 0 -> daemon -> coordinator, once per step, ordered per epoch. Sent again after re-
  # registration; idempotent per (job, step): the same step always has the same figures.
  job                @0 :UInt64;
  epoch              @1 :UInt32;
  step               @2 :Int64;    # >= 1
  loss               @3 :Float64;  # nats; NaN and infinity are news, not errors
  gradNorm           @4 :Float64;  # before clipping; may be NaN or infinite
  learningRate       @5 :Float64;  # finite
  tokens             @6 :Int64;    # >= 0
  stepSeconds        @7 :Float64;  # finite, >= 0
  expertLoadMaxRatio @8 :Float64;  # finite, >= 0
  finishedAtNs       @9 :Int64;    # rank 0's wall clock
  mtpLoss            @10 :Float64; # as loss; 0 without multi-token prediction
  balanceLoss        @11 :Float64; # as loss; 0 without a balance loss
  checkpointSeconds  @12 :Float64; # of stepSeconds; finite, >= 0; 0: the state was not saved
  guardSignal        @13 :UInt8;   # GuardSignal of comm/run/guards.h; 0: nothing was found
  guardAction        @14 :UInt8;   # GuardPolicy: what follows; 0: nothing; 3, roll back:
                                   # the step is not finished
  guardValue         @15 :Float64; # that was found; may be NaN or infinite
  guardMedian        @16 :Float64; # of a spike: what is usual
  guardLimit         @17 :Float64; # of a spike: what the value is above
}

struct EvaluationReport {
  # Rank 0 -> daemon -> coordinator. Repeats as StepReport.
  job    @0 :UInt64;
  epoch  @1 :UInt32;
  step   @2 :Int64;    # >= 0
  loss   @3 :Float64;  # held out, nats per token; may be NaN or infinite
  tokens @4 :Int64;    # >= 0
}

struct SavedSlice {
  # One box of one tensor in a segment file.
  name       @0 :Text;         # never empty
  dtype      @1 :Text;         # never empty
  shape      @2 :List(Int64);  # of the whole tensor, at most 8 dimensions, each >= 1
  boxOffset  @3 :List(Int64);  # as many as shape; offset >= 0
  boxSize    @4 :List(Int64);  # as many as shape; size >= 1, offset + size <= shape
  fileOffset @5 :UInt64;
  byteCount  @6 :UInt64;
  digestLow  @7 :UInt64;       # XXH3-128 of the slice's bytes
  digestHigh @8 :UInt64;
}

struct SegmentSaved {
  # Rank -> daemon -> coordinator: the segment is durable. Sent again after re-registration;
  # idempotent.
  job              @0 :UInt64;
  epoch            @1 :UInt32;
  rank             @2 :Int32;
  step             @3 :Int64;   # >= 0
  file             @4 :Text;    # relative to the job's checkpoint directory, no ".."
  byteCount        @5 :UInt64;
  footerDigestLow  @6 :UInt64;
  footerDigestHigh @7 :UInt64;
  slices           @8 :List(SavedSlice);
  pauses           @9 :Bool;    # the rank trains nothing more unless this checkpoint fails
}

struct SaveFailed {
  # Rank -> daemon -> coordinator: the checkpoint of this step cannot be completed; the run goes
  # on.
  job    @0 :UInt64;
  epoch  @1 :UInt32;
  rank   @2 :Int32;
  step   @3 :Int64;   # >= 0
  reason @4 :Text;
}

struct CheckpointOutcome {
  # Coordinator -> workers -> ranks. Loss-tolerant: only frees buffers and tells the last step it
  # may end.
  job       @0 :UInt64;
  epoch     @1 :UInt32;
  step      @2 :Int64;  # >= 0
  committed @3 :Bool;
  reason    @4 :Text;   # when not committed
}

struct SaveInterval {
  # Coordinator -> workers -> ranks. Loss-tolerant: the newest wins; sent again with every
  # CheckpointOutcome.
  job   @0 :UInt64;
  epoch @1 :UInt32;
  steps @2 :Int64;  # >= 1, from one saved state to the next
}

struct PauseRanks {
  # Coordinator -> workers -> ranks: save after the step in progress, then wait for StopRanks.
  # Loss-tolerant: repeated until the ranks have saved.
  job   @0 :UInt64;
  epoch @1 :UInt32;
}

struct WorkerLeaving {
  # Worker -> coordinator: the daemon was asked to end. Repeated until WorkerReleased; `left` is
  # not: it ends now.
  incarnation @0 :UInt64;  # never 0
  left        @1 :Bool;
}

struct WorkerReleased {
  # Coordinator -> worker: nothing of it is needed any more. Sent for every WorkerLeaving.
  worker @0 :UInt64;  # never 0
}

struct CheckHost {
  # Coordinator -> worker: check the host. Repeated until HostChecked.
  request @0 :UInt64;  # never 0; another one asks for another check
}

struct HostChecked {
  # Worker -> coordinator, in answer to each CheckHost once that check has ended.
  request @0 :UInt64;  # never 0
  passed  @1 :Bool;
  report  @2 :Text;    # what is wrong, else what was measured; at most 4 KiB
}

struct RankFinished {
  # Rank -> daemon -> coordinator: every step is done. Sent again after re-registration;
  # idempotent.
  job   @0 :UInt64;
  epoch @1 :UInt32;
  rank  @2 :Int32;
  step  @3 :Int64;  # >= 0
}

struct LogChunk {
  # Daemon -> coordinator. Whole lines where possible; may be dropped under load, which shows as a
  # gap in offsets.
  job    @0 :UInt64;
  epoch  @1 :UInt32;
  rank   @2 :Int32;
  offset @3 :UInt64;  # byte position in that rank's log
  text   @4 :Data;    # at most 1 MiB; any bytes, a rank prints what it likes
}

struct RankHello {
  # Rank -> daemon: first message of its connection. Answered by StartRank when the daemon spawned
  # that process.
  job   @0 :UInt64;
  epoch @1 :UInt32;
  rank  @2 :Int32;
  pid   @3 :Int32;  # >= 1
}

struct RankProgress {
  # Rank -> daemon, after each step. Loss-tolerant: the newest wins. Every Float64 is finite and
  # >= 0.
  job                 @0 :UInt64;
  epoch               @1 :UInt32;
  rank                @2 :Int32;
  step                @3 :Int64;    # >= 0
  stepSeconds         @4 :Float64;  # of this step, as are the next six
  computeSeconds      @5 :Float64;
  expertWaitSeconds   @6 :Float64;
  pipelineWaitSeconds @7 :Float64;
  reduceSeconds       @8 :Float64;
  optimizerSeconds    @9 :Float64;
  checkpointSeconds   @10 :Float64;
  bytesSent           @11 :UInt64;  # since the rank began
  arenaBytes          @12 :UInt64;
}

struct RanksStopped {
  # Worker -> coordinator, in answer to each StopRanks (which is repeated until then): no rank of this
  # job up to and including the epoch runs here now, and none will be started.
  job   @0 :UInt64;
  epoch @1 :UInt32;
  held  @2 :List(HeldRank);  # at most 4096, each rank once
  copies @3 :List(HeldRank);  # of that epoch's state, also of others' ranks; likewise
}

struct HeldRank {
  # What the daemon holds in memory of a rank that ended.
  rank  @0 :Int32;
  steps @1 :List(Int64);  # 1 to 3, ascending, >= 0
}

struct MirrorRanks {
  # Coordinator -> worker: copy the state of your ranks after that step. Repeated until answered by
  # RanksMirrored, or replaced by one of a later step.
  job            @0 :UInt64;
  epoch          @1 :UInt32;
  step           @2 :Int64;   # >= 1
  keptStep       @3 :Int64;   # 0 .. step - 1; copies of other steps go
  bytesPerSecond @4 :Int64;   # >= 1, of all that the worker sends
  send           @5 :List(MirrorTarget);  # the worker's own ranks, each once; at most 4096
  keep           @6 :List(Int32);         # ranks of others, of which it takes in copies; each once
}

struct MirrorTarget {
  rank @0 :Int32;
  to   @1 :StatePlace;  # never nowhere
}

struct RanksMirrored {
  # Worker -> coordinator, in answer to MirrorRanks. Not resent.
  job     @0 :UInt64;
  epoch   @1 :UInt32;
  step    @2 :Int64;  # >= 1
  failure @3 :Text;   # one sentence; empty: every copy is where it is to be
  missed  @4 :Bool;   # the ranks were faster than the daemon
  outdated @5 :Bool;  # the order was; then step and keptStep are of the newest one that came
  keptStep @6 :Int64; # 0 .. step - 1
}

struct ExpertLoadReport {
  # First rank of a stage -> daemon -> coordinator, before its SegmentSaved of that step. Repeats as
  # StepReport; the newest wins.
  job    @0 :UInt64;
  epoch  @1 :UInt32;
  rank   @2 :Int32;
  step   @3 :Int64;             # >= 1
  layers @4 :List(LayerLoads);  # each layer once; at most 1 Mi loads in all
}

struct LayerLoads {
  layer @0 :Int32;          # as in model.layers.N, >= 0
  loads @1 :List(Float64);  # by expert: tokens of a step, averaged over recent steps; finite, >= 0
}

struct InspectRanks {
  # Coordinator -> worker: what do your ranks of this attempt do now? Never repeated; asked anew
  # instead, with another number. A worker that does not know it says nothing.
  job     @0 :UInt64;
  epoch   @1 :UInt32;
  request @2 :UInt64;
}

struct RanksInspected {
  # Worker -> coordinator, in answer to InspectRanks. Not resent.
  job     @0 :UInt64;
  epoch   @1 :UInt32;
  request @2 :UInt64;              # of InspectRanks
  ranks   @3 :List(RankActivity);  # that have a process there; at most 4096
}

struct RankActivity {
  # One rank, as its daemon reads it from shared memory and the kernel.
  rank       @0 :Int32;
  process    @1 :ProcessState;
  recorded   @2 :Bool;    # there is a flight record: the fields up to changes are its
  phase      @3 :UInt8;   # as in comm/run/flight_record.h, 0 .. 8
  step       @4 :Int64;   # >= 0
  kind       @5 :UInt8;   # as in comm/run/trace_record.h, 0 .. 6
  what       @6 :UInt8;
  direction  @7 :UInt8;
  microbatch @8 :Int32;   # -1: none
  layer      @9 :Int16;   # -1: none
  peer       @10 :Int32;  # the rank it waits for; -1: it does not wait
  sending    @11 :Bool;   # that rank is to take a message, not to send one
  changes    @12 :UInt64;
  quietMs    @13 :Int64;  # 0 .. 2^40, since the record changed; without one since the process began
  logTail    @14 :Data;   # the last lines of its stderr, at most 2 KiB; any bytes
}

enum ProcessState {
  unknown   @0;
  running   @1;
  sleeping  @2;
  diskSleep @3;
  stopped   @4;
  ended     @5;
}
