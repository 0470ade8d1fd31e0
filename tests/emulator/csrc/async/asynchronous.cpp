#include "async/async_copies.h"
#include "core/binder.h"

namespace emulator {

void add_mbarrier(Opcodes& opcodes);

namespace {

void bind_cp(Binder& b) {
  if (!b.take("async")) b.unsupported("the kind of cp");
  if (b.take("bulk")) {
    bind_cp_async_bulk(b);
  } else {
    bind_cp_async(b);
  }
}

}  // namespace

void add_asynchronous(Opcodes& opcodes) {
  opcodes.add("cp", bind_cp);
  add_mbarrier(opcodes);
}

}  // namespace emulator
