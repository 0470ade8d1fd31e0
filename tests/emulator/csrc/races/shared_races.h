// Races in shared memory: every word remembers who touched it since it was last ordered.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/lanes.h"
#include "core/step.h"

namespace emulator {

class Warp;

class SharedRaces {
 public:
  explicit SharedRaces(uint32_t base, uint32_t bytes);

  struct Access {
    Warp* warp;
    const Step* step;
    int lane;
    uint32_t address;
    uint32_t bytes;
    bool write;
    bool async_proxy =
        false;  // bytes written by ordinary stores must be ordered for this proxy as well
    bool same_value =
        false;            // a store of what is there already: lanes of one instruction may agree
    bool atomic = false;  // atomics do not race with one another
  };
  // Records the access; a race is reported at the access that came second.
  void access(const Access& access);

  // An asynchronous access, under way from now on: what conflicts with it is a race until it ends.
  // The ticket ends it.
  uint32_t begin(const Access& access);
  // It ended, and the lane knows (cp.async.wait_group): from here on it is an access of that lane
  // at its warp's current epoch.
  void end_by_lane(Warp& warp, int lane, uint32_t ticket);
  // It ended, and whoever knows `epoch` of the asynchronous agent knows (bulk copies, wgmma).
  void end_by_agent(int agent, uint32_t epoch, uint32_t ticket);

 private:
  static constexpr uint32_t kUnderWay = ~0u;  // an epoch that nobody ever knows

  struct Entry {
    uint32_t epoch;
    LaneMask lanes;  // of `warp`; agents past the threads count on in the same way
    int32_t pc;
    uint32_t ticket;  // 0: not asynchronous
    uint16_t warp;
    uint8_t bytes;  // of the word, a bit each
    bool write : 1;
    bool async_proxy : 1;
    bool atomic : 1;
  };
  // A word mostly has one writer and a few readers.
  struct Word {
    static constexpr int kInline = 3;
    Entry entries[kInline];
    uint32_t count = 0;
    std::unique_ptr<std::vector<Entry>> more;
  };
  struct Range {
    uint32_t address, bytes;
  };

  template <class Visit>
  void for_each_word(uint32_t address, uint32_t bytes, Visit visit);
  void touch(Word& word, uint8_t bytes, const Access& access, uint32_t address, uint32_t ticket);
  bool supersedes(const Entry& old, uint8_t bytes, const Access& access, uint32_t address);
  static Entry& entry(Word& word, uint32_t i);
  static void push(Word& word, const Entry& entry);
  static void remove(Word& word, uint32_t i);
  bool is_known(const Entry& entry, const Access& access) const;
  bool is_proxied(const Entry& entry, const Access& access) const;
  void report(const Entry& entry, const Access& access, uint32_t address, bool proxy);
  template <class Change>
  void end(uint32_t ticket, Change change);

  uint32_t base_;
  std::vector<Word> words_;
  std::vector<Range> under_way_;  // by ticket - 1
  std::vector<uint32_t> free_tickets_;
};

}  // namespace emulator
