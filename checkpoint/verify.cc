#include "checkpoint/verify.h"

#include <fmt/format.h>

#include <algorithm>

namespace penstock {
namespace {

constexpr size_t kTensorsNamed = 8;

// What a manifest says lies in one segment.
struct Listed {
  const ManifestTensor* tensor = nullptr;
  const ManifestPiece* piece = nullptr;
};
std::string name_of(const std::string& tensor, const Box& box) {
  return tensor + " " + to_string(box);
}

void add_tensor(CheckpointDamage& damage, std::string name) {
  ++damage.tensor_count;
  if (damage.tensors.size() < kTensorsNamed) damage.tensors.push_back(std::move(name));
}

// The segment as a whole: missing, of another attempt, with a broken footer.
CheckpointDamage whole_file(const ManifestSegment& segment, const std::vector<Listed>& pieces,
                            const Status& status) {
  CheckpointDamage damage{.file = segment.file,
                          .rank = segment.rank,
                          .tensors = {},
                          .end = segment.byte_count,
                          .what = without_file(status.message(), segment.file),
                          .status = status};
  for (const Listed& listed : pieces) {
    add_tensor(damage, name_of(listed.tensor->name, listed.piece->box));
  }
  return damage;
}

Status compare_piece(const SegmentReader& reader, const ManifestSegment& segment,
                     const Listed& listed) {
  const ManifestTensor& tensor = *listed.tensor;
  PENSTOCK_TRY_ASSIGN(const size_t index, reader.find(tensor.name, listed.piece->box));
  const SegmentSlice& entry = reader.slices()[index];
  if (entry.slice.dtype == tensor.dtype && entry.slice.shape == tensor.shape &&
      entry.digest == listed.piece->digest) {
    return {};
  }
  return data_loss(fmt::format("segment {} (rank {}): tensor {} is not what the manifest says",
                               reader.path().string(), segment.rank,
                               name_of(tensor.name, listed.piece->box)));
}

// False when the visitor has seen enough.
bool visit_segment(const Path& directory, const Manifest& manifest, const ManifestSegment& segment,
                   const std::vector<Listed>& pieces, bool read_data,
                   const std::function<bool(const CheckpointDamage&)>& visit,
                   const ReadPace& pace) {
  const Result<SegmentReader> reader = open_listed(directory, manifest, segment);
  if (!reader.ok()) return visit(whole_file(segment, pieces, reader.status()));
  for (const Listed& listed : pieces) {
    const Status same = compare_piece(*reader, segment, listed);
    if (!same.ok() && !visit(whole_file(segment, {listed}, same))) return false;
  }
  bool go_on = true;
  std::optional<size_t> last_slice;
  const auto visit_data = [&](const SegmentDamage& found) {
    CheckpointDamage damage{.file = segment.file,
                            .rank = segment.rank,
                            .tensors = {},
                            .begin = found.begin,
                            .end = found.end,
                            .what = found.what,
                            .status = reader->describe(found)};
    for (const size_t slice : found.slices) {
      const TensorSlice& entry = reader->slices()[slice].slice;
      add_tensor(damage, name_of(entry.name, entry.box));
      damage.continues = damage.continues || slice == last_slice;
    }
    if (!found.slices.empty()) last_slice = found.slices.back();
    go_on = visit(damage);
    return go_on;
  };
  if (read_data) reader->find_damage(visit_data, pace);
  return go_on;
}

}  // namespace

std::string without_file(const std::string& message, const std::string& file) {
  const size_t at = message.rfind(file);
  if (at == std::string::npos) return message;
  std::string rest = message.substr(at + file.size());
  if (rest.starts_with(" (rank ")) rest.erase(0, rest.find(')') + 1);
  rest.erase(0, rest.find_first_not_of(": "));
  return rest.empty() ? message : rest;
}

Result<SegmentReader> open_listed(const Path& directory, const Manifest& manifest,
                                  const ManifestSegment& listed) {
  const Path path = directory / listed.file;
  Result<SegmentReader> reader = SegmentReader::open(path);
  if (!reader.ok()) {
    const Status status = reader.status().with_context(fmt::format("rank {}", listed.rank));
    // A segment that a manifest names and that is not there is lost data, not a wrong question.
    // One that only we may not open is no lost data.
    return status.code() == Code::kNotFound ? data_loss(status.message()) : status;
  }
  const SegmentHeader& header = reader->header();
  const SegmentIdentity wanted = {manifest.job, manifest.epoch, listed.rank, manifest.step};
  if (header.store != manifest.store || header.identity != wanted) {
    return data_loss(
        fmt::format("segment {} was written by rank {} of job {}, epoch {}, step {} of store {}; "
                    "rank {} of job "
                    "{}, epoch {}, step {} of store {} is wanted",
                    path.string(), header.identity.rank, header.identity.job, header.identity.epoch,
                    header.identity.step, to_hex(header.store), wanted.rank, wanted.job,
                    wanted.epoch, wanted.step, to_hex(manifest.store)));
  }
  if (reader->byte_count() != listed.byte_count ||
      reader->footer_digest() != listed.footer_digest) {
    return data_loss(fmt::format(
        "segment {} (rank {}) is not the one that was saved: {} bytes, "
        "footer digest {}; {} bytes, {} wanted",
        path.string(), listed.rank, reader->byte_count(), to_hex(reader->footer_digest()),
        listed.byte_count, to_hex(listed.footer_digest)));
  }
  if (header.format != manifest.version) {
    return data_loss(
        fmt::format("segment {} (rank {}) has format {}, its checkpoint has {}: ranks "
                    "and coordinator are of different versions",
                    path.string(), listed.rank, header.format, manifest.version));
  }
  const auto name = parse_segment_file_name(listed.file);
  if (!name.ok() || name->uuid != header.segment) {
    return data_loss(fmt::format("segment {} (rank {}) was written under another name",
                                 path.string(), listed.rank));
  }
  return reader;
}

void visit_damage(const Path& directory, const Manifest& manifest, bool read_data,
                  const std::function<bool(const CheckpointDamage&)>& visit, const ReadPace& pace) {
  std::vector<std::vector<Listed>> by_segment(manifest.segments.size());
  for (const ManifestTensor& tensor : manifest.tensors) {
    for (const ManifestPiece& piece : tensor.pieces) {
      by_segment[piece.segment].push_back({&tensor, &piece});
    }
  }
  for (size_t i = 0; i < by_segment.size(); ++i) {
    const ManifestSegment& segment = manifest.segments[i];
    if (!visit_segment(directory, manifest, segment, by_segment[i], read_data, visit, pace)) return;
  }
  if (const Status whole = prove_whole(manifest); !whole.ok()) {
    visit({.file = manifest_file_name(manifest.commit_seq),
           .rank = {},
           .tensors = {},
           .what = whole.message(),
           .status = whole});
  }
}

DamageReport find_damage(const Path& directory, const Manifest& manifest, const ReadPace& pace) {
  DamageReport report;
  const auto add = [&](const CheckpointDamage& damage) {
    if (!report.damages.empty()) {
      CheckpointDamage& last = report.damages.back();
      if (last.file == damage.file && last.end == damage.begin && last.what == damage.what) {
        last.end = damage.end;
        last.tensor_count += damage.tensor_count - damage.continues;
        for (size_t i = damage.continues; i < damage.tensors.size(); ++i) {
          if (last.tensors.size() < kTensorsNamed) last.tensors.push_back(damage.tensors[i]);
        }
        return true;
      }
    }
    ++report.damage_count;
    if (report.damages.size() < kDamagesListed) report.damages.push_back(damage);
    return true;
  };
  visit_damage(directory, manifest, /*read_data=*/true, add, pace);
  return report;
}

}  // namespace penstock
