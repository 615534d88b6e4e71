#!/usr/bin/env python3
"""Runs the fault tests and writes the three tables of docs/checkpoint-faults.md from what they report.

  tests/checkpoint/fault_tables.py BUILD      BUILD: build/release, with the tests of BINARIES built

A row is only written when every test it names ran and passed; the exit code is 1 when one did not. Counts of runs
come from the properties that tests/checkpoint/index_crash_test.cc records for each crash point.
"""
import concurrent.futures
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/checkpoint-faults.md"
BINARIES = ["checkpoint_" + name for name in (
    "crash", "index_fault", "index", "hostile_disk", "corruption", "store", "segment", "manifest", "removal", "loader",
    "verify", "compare", "fuzz", "adversary", "disk_file", "disk_full")
] + ["worker_engine_segment_saver", "worker_engine_memory", "cli_checkpoint", "fuzz_corpus"]
SIMULATED = ["IndexCrashTest.AKilledProcessLeavesStoreAndIndexWhole", "IndexCrashTest.APowerLossLeavesStoreAndIndexWhole"]
REBUILD = ["IndexCrashTest.ARebuildOfTheIndexMayBeCutShortAnywhere"]
ERRORS_IN_INDEX = ["IndexCrashTest.AnErrorAtAnyCallKeepsTheOldCheckpointOrGivesTheNew",
                   "IndexCrashTest.MoreCrashesDuringRecoveryChangeNothing"]

# point: (what, the tests of SIMULATED or REBUILD that stop there and count it, tests of its own). Without either it
# cannot happen here: the text says why.
CRASHES = {
    "C1": ("before the first file of a save; there is no intent row, epochs tell orphans", SIMULATED, []),
    "C2": ("before the first segment exists", SIMULATED, []),
    "C3": ("segment created, reserved, header torn", SIMULATED, []),
    "C4": ("in the data of a segment: writes under way (up to four of 4 MiB) done, half done or not; pages of 4 KiB lost",
           SIMULATED, ["CrashTest.C4ACrashWithSeveralWritesUnderWayLeavesTheOldOrTheNewCheckpointWhole"]),
    "C5": ("data written, footer torn", SIMULATED, []),
    "C6": ("footer written, trailer torn", SIMULATED, []),
    "C7": ("segment written, not synced", SIMULATED, []),
    "C8": ("segment synced, its name not", SIMULATED, []),
    "C9": ("one rank's segment done, the other's not begun", SIMULATED, []),
    "C10": ("a rank of another step or epoch", [],
            ["StoreTest.ASegmentThatIsNotTheOneDescribedIsRefused", "StoreTest.AStaleEpochCannotCommit"]),
    "C11": ("the coordinator holds all reports, no manifest yet", SIMULATED, []),
    "C12": ("temporary manifest torn", SIMULATED, []),
    "C13": ("temporary manifest written, not synced or not closed", SIMULATED, []),
    "C14": ("before the rename", SIMULATED, []),
    "C15": ("renamed, directory not synced", SIMULATED, []),
    "C16": ("durable, before the index batch", SIMULATED, []),
    "C17": ("in the index batch: RocksDB's log torn or not synced", SIMULATED, []),
    "C18": ("flush, RocksDB's MANIFEST, new log, witness", SIMULATED, []),
    "C19": ("committed and indexed, before the next thing", SIMULATED, []),
    "C20": ("does not exist: there is no LATEST file, the highest whole manifest is the newest", [], []),
    "C21": ("removal: between any two of its steps", SIMULATED,
            ["CrashTest.ARemovalWithoutTheIndexIsNeverTakenForALoss"]),
    "C22": ("removal: between two unlinks of segments", SIMULATED, []),
    "C23": ("removal beside a reader", [],
            ["HostileDiskTest.AReaderOfACheckpointThatIsBeingRemovedGetsItsBytesOrAnError"]),
    "C24": ("does not exist: no save shares segments with another; a segment that another manifest names is kept", [],
            ["RemovalTest.ASegmentThatAKeptManifestNamesStays"]),
    "C25": ("rebuilding the index", REBUILD, []),
    "C26": ("RocksDB's compaction; segments are never moved", SIMULATED, []),
    "C27": ("during a load, then a load again; loading opens files for reading only", [],
            ["HostileDiskTest.C27AReaderKilledInTheMiddleOfALoadChangesNothing"]),
    "C28": ("does not exist: nothing is upgraded in place; format 1 is read, written is 2", [],
            ["CompareTest.CheckpointsOfFormatOneAreStillReadVerifiedAndCompared",
             "CompareTest.AStoreOfFormatOneGoesOnWithTheNewOne"]),
    "C29": ("two coordinators: the lock, then the epoch", [],
            ["StoreTest.ASecondWriterIsRefusedUntilTheFirstIsGone", "StoreTest.AStaleEpochCannotCommit",
             "IndexTest.ASecondProcessCannotOpenIt"]),
    "C30": ("SIGSTOP after the rename, before its sync, then SIGCONT or SIGKILL; nothing in the store reads a clock", [],
            ["StoppedWriterTest.C30KeepsItsLockAndFinishesWhenItGoesOn",
             "StoppedWriterTest.C30ItsLockGoesWithItWhenItIsKilled"]),
    "C31": ("the state changes while it is written", [], ["HeldStateTest.StaysAsItIsWhileStepsGoOn"]),
}

# (what fails, what comes of it, tests)
ERRORS = [
    ("any one change of store or index: EIO or ENOSPC, then a power loss", "the old checkpoint or the new",
     ["CrashTest.AnErrorAtAnyCall*", ERRORS_IN_INDEX[0]]),
    ("a sync once, and the next would succeed", "the attempt is dead, its file removed; the next save makes new files",
     ["CrashTest.APowerLossAfterAFailedSync*", "SegmentTest.AnyFailedCallRemovesTheFileAndSaysWhich"]),
    ("a second and third crash during recovery", "nothing changes",
     ["CrashTest.ASecondCrashDuringRecovery*", ERRORS_IN_INDEX[1]]),
    ("a write stops short, is not taken (EINVAL, EAGAIN, EINTR), or the ring refuses it", "completed another way",
     ["DiskFileTest.AWriteThatIsCutShortNotTakenOrRefusedIsCompleted"]),
    ("a write ends with EIO in the ring", "the save fails, no file stays, no memory is given back before its time",
     ["DiskFileTest.AnErrorOfAnyWriteFailsTheSaveAndLeavesNoFile", "DiskFileTest.AFileThatIsGivenUpWaitsForItsWrites"]),
    ("writes end in another order; no O_DIRECT; no io_uring", "the same bytes",
     ["DiskFileTest.EveryWayToTheDiskLeavesTheSameBytes", "DiskFileTest.SegmentsOfEverySizeAreWholeByEveryWay",
      "DiskRingTest.WhereIoUringIsForbiddenSavesGoOnWithoutIt"]),
    ("the disk is full (a file system of 1 MiB)", "refused before the first byte",
     ["DiskFullTest.ASaveThatDoesNotFitIsRefusedAndThePreviousCheckpointStaysGood",
      "SegmentSaverTest.AFullDiskIsReportedAndTheNextSaveIsTried"]),
    ("the file system turns read-only", "read from as ever, refused for writing",
     ["HostileDiskTest.ADiskThatTurnsReadOnlyIsReadFromAndRefusedForWriting"]),
    ("no free file descriptor (EMFILE) at any open", "said; nothing is taken for empty",
     ["HostileDiskTest.AProcessWithoutFreeDescriptorsIsToldSoAndLosesNothing"]),
    ("syncs of files, or of directories, that do nothing", "these tests notice: each promise above breaks",
     ["CrashTest.WithoutFileSyncs*", "CrashTest.WithoutDirectorySyncs*"]),
]

# case: (injected, found by, tests: a name that ends in * stands for all that begin so)
CORRUPTIONS = {
    "K1": ("a bit flipped in the first, middle, last byte of a tensor, in padding; in every byte in turn",
           "block checksum; padding is covered too",
           ["CorruptionTest.K1Flip*", "AdversaryTest.EveryFlippedByteOfEverySegmentIsFound"]),
    "K2": ("a bit flipped in header, slice table, footer, end magic", "checksums of header and trailer, footer digest",
           ["CorruptionTest.K2Flip*"]),
    "K3": ("truncated by 1 byte, 64, a page, to the data, to 0; to every length in turn",
           "file size in the trailer, end magic",
           ["CorruptionTest.K3*", "AdversaryTest.EveryTruncationOfASegmentIsFoundWithoutReadingItsData"]),
    "K4": ("a byte, and a second trailer, appended", "trailer and its file size", ["CorruptionTest.K4*"]),
    "K5": ("4 KiB of zeros", "block checksum", ["CorruptionTest.K5*"]),
    "K6": ("two blocks of a tensor exchanged", "block checksum, salted with the block's index", ["CorruptionTest.K6*"]),
    "K7": ("a block of the older checkpoint in its place", "block checksum, salted with the segment's uuid",
           ["CorruptionTest.K7*"]),
    "K8": ("a block of another rank", "block checksum", ["CorruptionTest.K8*"]),
    "K9": ("the segment of another attempt, or of the older checkpoint", "footer digest in the manifest; step in the header",
           ["CorruptionTest.K9*"]),
    "K10": ("a segment deleted", "missing when opened", ["CorruptionTest.K10*"]),
    "K11": ("a segment named twice in a manifest, or under another name than its own",
            "strictly ascending names; the uuid in its header",
            ["ManifestTest.ForgedManifestsAreRefusedThoughTheirDigestIsRight", "CorruptionTest.K11*"]),
    "K12": ("headers, footers and trailers with offsets past the end, overlapping, huge, overflowing; their checksums right",
            "bounds of their parsers",
            ["SegmentTest.Forged*", "SegmentTest.AFooterThatDoesNotFitItsFileIsRefused", "FuzzTest.MutatedFooters*"]),
    "K13": ("a gap, an overlap", "proof of tiling", ["CorruptionTest.K13*", "ManifestTest.AGapOrOverlapInATensorIsNamed"]),
    "K14": ("manifest flipped, truncated, an older copy in its place, a forged predecessor, another format than its segments'",
            "digest line, number against name, chain of digests, format in the header",
            ["CorruptionTest.K14*", "StoreTest.AForgedPredecessorBreaksTheChain"]),
    "K15": ("every file of the index flipped, cut, lost, put back older, its logs with records twice; the whole index rolled "
            "back or deleted, a file in its place",
            "RocksDB's checksums; no record twice in its logs; the chain of changes and its witness",
            ["IndexFaultTest.*", "IndexAdversaryTest.*", "IndexTest.AFileInItsPlaceIsMovedAside"]),
    "K16": ("the index knows commits whose manifests are gone", "`reconcile()`: said to be lost, numbers not used again",
            ["IndexTest.AVanishedManifestIsReportedAsLostAndItsNumberNotReused",
             "IndexTest.WhatWasRemovedWithoutTheIndexIsNotLostAndWhatWasLostIs"]),
    "K17": ("cannot happen: there is no LATEST file", "—", []),
    "K18": ("all files of one rank deleted", "missing when opened, the rank is named", ["CorruptionTest.K18*"]),
    "K19": ("a bit flipped between memory and disk", "block checksum, made of the buffer that is written; readers check their own buffer",
            ["HostileDiskTest.K19*"]),
    "K20": ("a tensor of another shape or type than the model's", "the load plan, before reading",
            ["LoaderTest.WhatDoesNotFitTheCheckpointIsRefusedBeforeReading"]),
    "K21": ("a segment, a manifest of another store", "uuid of the store", ["CorruptionTest.K21*", "StoreTest.ACheckpointOfAnotherStoreInThisDirectoryIsRefused"]),
    "K22": ("equal and backward clocks", "harmless: nothing is decided by clocks", ["StoreTest.EqualOrBackwardClocksChangeNothing"]),
    "K23": ("symbolic links, directories, pipes, JSON bombs, paths as names", "opened without following; bounds; names checked",
            ["CorruptionTest.K23*", "StoreTest.PipesAndLinksInPlaceOfItsFilesAreRefusedAndNeverWaitedFor",
             "ManifestTest.JsonBombsAreRefused", "RemovalTest.RemovalFilesRoundTripAndRefusePaths"]),
    "K24": ("random damage to every format", "the parsers", ["FuzzTest.*", "Parsers/FuzzCorpusTest.*"]),
    "K25": ("each kind of damage of K1 to K14, K18 and K23 before what `penstock checkpoint verify` goes by",
            "found, and nothing else; exit code 14; `--repair` keeps the best there is",
            ["CorruptionTest.*", "VerifyTest.*", "CheckpointTest.DamageIsNamedWithFileRankTensorAndBytesAndExitsFourteen",
             "CheckpointTest.Repair*"]),
}


def run_one(build, folder, number, name, wanted):
    """Name -> (passed, properties) of the tests of one binary that `wanted` selects."""
    report = pathlib.Path(folder) / f"{number}.json"
    subprocess.run([build / "bin" / f"{name}_test", f"--gtest_filter={wanted}", f"--gtest_output=json:{report}"],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    outcomes = {}
    if not report.exists():  # it ended abnormally: its tests did not run
        return outcomes
    for suite in json.loads(report.read_text())["testsuites"]:
        for test in suite["testsuite"]:
            properties = {key: value for key, value in test.items() if re.fullmatch(r"C\d+", key)}
            outcomes[f"{suite['name']}.{test['name']}"] = ("failures" not in test, properties)
    return outcomes


def run_tests(build):
    work = [(name, "*") for name in BINARIES]
    work += [("checkpoint_index_crash", test) for test in SIMULATED + REBUILD + ERRORS_IN_INDEX]
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda item: run_one(build, folder, item[0], *item[1]), enumerate(work)):
            outcomes.update(found)
    return outcomes


def held(outcomes, tests):
    """How many tests of these names passed; raises when one is missing or failed."""
    count = 0
    for name in tests:
        matching = [t for t in outcomes if t == name or (name.endswith("*") and t.startswith(name[:-1]))]
        failed = [t for t in matching if not outcomes[t][0]]
        if not matching or failed:
            raise LookupError(f"{name}: " + (", ".join(failed) + " failed" if failed else "did not run"))
        count += len(matching)
    return count


def counted(outcomes, point, tests):
    """'killed: 24 runs, 20 old, 4 new; power lost: …' from what the tests recorded."""
    held(outcomes, tests)
    texts = [(name, outcomes[name][1][point]) for name in tests if point in outcomes[name][1]]
    if not texts:
        raise LookupError(f"{point} was never reached")
    return "; ".join(("killed: " if "Killed" in name else "power lost: ") + text for name, text in texts)


def named(outcomes, tests):
    held(outcomes, tests)
    return ", ".join(f"`{name}`" for name in tests)


def crash_rows(outcomes):
    lines = ["| point | what | held in: runs, and which checkpoint was newest afterwards; tests |", "|---|---|---|"]
    for point, (what, counting, tests) in CRASHES.items():
        results = [counted(outcomes, point, counting)] if counting else []
        results += [named(outcomes, tests)] if tests else []
        lines.append(f"| {point} | {what} | {'; '.join(results) or '—'} |")
    return "\n".join(lines) + "\n"


def error_rows(outcomes):
    lines = ["| what fails | what comes of it | tests that passed |", "|---|---|---|"]
    lines += [f"| {what} | {outcome} | {named(outcomes, tests)} |" for what, outcome, tests in ERRORS]
    return "\n".join(lines) + "\n"


def corruption_rows(outcomes):
    lines = ["| case | injected | found by | tests that passed |", "|---|---|---|---|"]
    for case, (injected, found, tests) in CORRUPTIONS.items():
        result = f"{held(outcomes, tests)}: {named(outcomes, tests)}" if tests else "—"
        lines.append(f"| {case} | {injected} | {found} | {result} |")
    return "\n".join(lines) + "\n"


def replace(text, marker, table):
    before, rest = text.split(f"<!-- {marker} -->")
    return f"{before}<!-- {marker} -->\n{table}<!-- end of {marker} -->{rest.split(f'<!-- end of {marker} -->')[1]}"


def main():
    outcomes = run_tests(pathlib.Path(sys.argv[1]))
    try:
        text = replace(DOCUMENT.read_text(), "crash points", crash_rows(outcomes))
        text = replace(text, "errors", error_rows(outcomes))
        DOCUMENT.write_text(replace(text, "corruption cases", corruption_rows(outcomes)))
    except LookupError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
