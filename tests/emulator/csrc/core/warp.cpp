#include "core/warp.h"

#include <algorithm>

#include "core/block.h"
#include "core/launch.h"

namespace emulator {

Warp::Warp(Block& block, const Program& program, int index, LaneMask live)
    : block_(block),
      program_(program),
      index_(index),
      live_(live),
      groups_{{0, live, Group::State::Ready, false}} {
  constexpr size_t kLine = 64;
  storage_.resize(2 * size_t{program.frame_bytes} + kLine);
  values_ =
      storage_.data() + (kLine - reinterpret_cast<uintptr_t>(storage_.data()) % kLine) % kLine;
  undefined_ = values_ + program.frame_bytes;
  // A register is undefined until it is written.
  std::memset(undefined_, 0xff, program.frame_bytes);
  taint_.assign(program.slots, kAllLanes);
  written_.assign(program.slots, 0);
  for (const Program::Constant& constant : program.constants) {
    for (int l = 0; l < kLanes; ++l) store_lane(constant.slot, l, constant.bits);
  }
  set_specials();
}

void Warp::set_specials() {
  const LaunchShape& shape = block_.launch().shape;
  const int* at = block_.coordinates();
  for (const Program::Special& special : program_.specials) {
    const std::string& name = special.name;
    const int axis = name.size() > 2 && name[name.size() - 2] == '.' ? name.back() - 'x' : -1;
    const std::string base = axis < 0 ? name : name.substr(0, name.size() - 2);
    for (int l = 0; l < kLanes; ++l) {
      const auto thread = static_cast<uint32_t>(this->thread(l));
      uint64_t value = 0;
      if (base == "%tid") {
        const uint32_t x = shape.block[0], y = shape.block[1];
        value = axis == 0 ? thread % x : axis == 1 ? thread / x % y : thread / x / y;
      } else if (base == "%ntid") {
        value = shape.block[axis];
      } else if (base == "%ctaid" || base == "%clusterid") {
        value = static_cast<uint64_t>(at[axis]);
      } else if (base == "%nctaid" || base == "%nclusterid") {
        value = shape.grid[axis];
      } else if (base == "%cluster_nctaid" || base == "%cluster_nctarank") {
        value = 1;
      } else if (base == "%laneid") {
        value = static_cast<uint64_t>(l);
      } else if (base == "%warpid") {
        value = static_cast<uint64_t>(index_);
      } else if (base == "%nwarpid") {
        value = static_cast<uint64_t>((block_.threads() + kLanes - 1) / kLanes);
      } else if (base == "%nsmid") {
        value = static_cast<uint64_t>(block_.limits().multiprocessors);
      } else if (base == "%smid") {
        value = static_cast<uint64_t>(block_.index() % block_.limits().multiprocessors);
      } else if (base == "%lanemask_eq") {
        value = lane_bit(l);
      } else if (base == "%lanemask_lt") {
        value = lane_bit(l) - 1;
      } else if (base == "%lanemask_le") {
        value = (lane_bit(l) - 1) | lane_bit(l);
      } else if (base == "%lanemask_gt") {
        value = static_cast<LaneMask>(~((lane_bit(l) - 1) | lane_bit(l)));
      } else if (base == "%lanemask_ge") {
        value = static_cast<LaneMask>(~(lane_bit(l) - 1));
      } else if (base == "%dynamic_smem_size") {
        value = shape.dynamic_shared_bytes;
      } else if (base == "%total_smem_size") {
        value = block_.shared().size();
      }
      // The rest are zero: %cluster_ctaid, %cluster_ctarank, %is_explicit_cluster, %gridid; clocks
      // tick.
      store_lane(special.slot, l, value);
    }
    if (base == "%clock" || base == "%clock64" || base == "%clock_hi" || base == "%globaltimer") {
      clocks_.push_back(special.slot);
    }
  }
}

void Warp::tick() {
  for (const Slot& slot : clocks_) {
    for (int l = 0; l < kLanes; ++l) store_lane(slot, l, serial_);
  }
}

uint64_t Warp::value(const Slot& slot, int lane) const {
  uint64_t bits = 0;
  std::memcpy(&bits, values_ + slot.offset + lane * slot.width, slot.width);
  return bits;
}

void Warp::report(Check check, const Step& step, int lane, const std::string& message,
                  const std::string& buffer, int64_t offset) {
  if (block_.launch().repeats(check, step.source->at.ptx_line)) return;
  Finding finding;
  finding.check = check;
  finding.message = message;
  finding.kernel = program_.name;
  finding.ptx_line = step.source->at.ptx_line;
  finding.ptx_text = step.source->text;
  const auto file = program_.files.find(step.source->at.file);
  if (file != program_.files.end()) finding.cuda_file = file->second;
  finding.cuda_line = step.source->at.cuda_line;
  std::copy_n(block_.coordinates(), 3, finding.block);
  const LaunchShape& shape = block_.launch().shape;
  const int thread = this->thread(lane);
  finding.thread[0] = thread % static_cast<int>(shape.block[0]);
  finding.thread[1] = thread / static_cast<int>(shape.block[0]) % static_cast<int>(shape.block[1]);
  finding.thread[2] = thread / static_cast<int>(shape.block[0] * shape.block[1]);
  finding.warp = index_;
  finding.lane = lane;
  finding.buffer = buffer;
  finding.offset = offset;
  block_.launch().report(std::move(finding));
}

void Warp::require_defined(const Step& step, const Slot& slot, LaneMask lanes, const char* use) {
  const LaneMask bad = tainted(slot) & lanes;
  if (bad != 0)
    report(Check::Uninitialised, step, first_lane(bad), std::string("an undefined value ") + use);
}

void Warp::split_off(LaneMask lanes, int pc) {
  Group other{pc, lanes, Group::State::Ready, false};
  group().lanes &= ~lanes;
  groups_.push_back(other);
}

void Warp::branch(LaneMask taken, int target) {
  const LaneMask stay = group().lanes & ~taken;
  if (taken == 0) {
    advance();
  } else if (stay == 0) {
    jump(target);
  } else {
    split_off(taken, target);
    advance();
  }
}

void Warp::exit(LaneMask lanes) {
  live_ &= ~lanes;
  group().lanes &= ~lanes;
  if (group().lanes == 0) groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(current_));
  block_.changed();
}

void Warp::resume(LaneMask lanes) {
  for (Group& group : groups_) {
    if ((group.lanes & lanes) == 0) continue;
    group.state = Group::State::Ready;
    ++group.pc;
  }
  block_.progressed();
}

bool Warp::gather(const Step& step, LaneMask members) {
  // Others that wait here for this group join it.
  const int pc = group().pc;
  for (size_t i = 0; i < groups_.size();) {
    if (i != current_ && groups_[i].gathering && groups_[i].pc == pc) {
      group().lanes |= groups_[i].lanes;
      groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
      if (i < current_) --current_;
    } else {
      ++i;
    }
  }
  const LaneMask missing = members & ~group().lanes;
  if ((missing & live_) != 0) {
    group().state = Group::State::Waiting;
    group().gathering = true;
    return false;
  }
  group().gathering = false;
  if (missing != 0) {
    report(Check::Convergence, step, first_lane(group().lanes),
           "names lane " + std::to_string(first_lane(missing)) + ", which has exited");
  }
  return true;
}

void Warp::polled(const Step& step, bool changed) {
  if (changed || polled_pc_ != step.pc) {
    polled_pc_ = step.pc;
    polls_ = 0;
  } else if (++polls_ >= 2) {
    block_.polled_in_vain();
    yield();
  }
}

// The lowest program counter first: in the code that compilers lay out, whoever is behind catches
// up with those who wait where paths meet.
Group* Warp::pick() {
  Group* best = nullptr;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].state != Group::State::Ready) continue;
    if (best == nullptr || groups_[i].pc < best->pc) {
      best = &groups_[i];
      current_ = i;
    }
  }
  return best;
}

void Warp::merge() {
  for (size_t i = 0; i < groups_.size(); ++i) {
    for (size_t j = i + 1; j < groups_.size();) {
      if (groups_[i].pc == groups_[j].pc && groups_[i].state == Group::State::Ready &&
          groups_[j].state == Group::State::Ready) {
        groups_[i].lanes |= groups_[j].lanes;
        groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(j));
      } else {
        ++j;
      }
    }
  }
}

Warp::Outcome Warp::run(int quantum) {
  while (live_ != 0) {
    if (groups_.size() > 1) merge();
    if (pick() == nullptr) {
      bool yielded = false;
      for (Group& group : groups_) {
        if (group.state != Group::State::Yielded) continue;
        group.state = Group::State::Ready;
        yielded = true;
      }
      return yielded ? Outcome::Yielded : Outcome::Waiting;
    }
    if (quantum-- == 0) return Outcome::Quantum;
    const int pc = group().pc;
    const Step& step = program_.steps[static_cast<size_t>(pc)];
    if (step.flow == Flow::Converged && group().lanes != live_ && !gather(step, live_)) continue;
    ++serial_;
    if (!clocks_.empty()) tick();
    LaneMask active = group().lanes;
    if (step.guard.valid) {
      require_defined(step, step.guard, active, "decides whether the instruction runs");
      const LaneMask holds = predicate(step.guard);
      active &= step.guard_negated ? ~holds : holds;
    }
    StepCounters& counters = block_.counters().steps[static_cast<size_t>(pc)];
    ++counters.executed;
    counters.lanes += static_cast<uint64_t>(count(active));
    if (active == 0) {
      advance();
      continue;
    }
    switch (step.flow) {
      case Flow::Next:
        step.run(*this, step, active);
        advance();
        break;
      case Flow::Converged:
        if (active != group().lanes) {
          report(Check::Convergence, step, first_lane(group().lanes & ~active),
                 "an .aligned instruction is predicated off in some lanes of the warp");
        }
        step.run(*this, step, active);
        advance();
        break;
      case Flow::Branch:
        step.run(*this, step, active);
        break;
      case Flow::Blocking:
        if (active != group().lanes) split_off(group().lanes & ~active, pc + 1);
        step.run(*this, step, active);
        break;
    }
  }
  return Outcome::Finished;
}

}  // namespace emulator
