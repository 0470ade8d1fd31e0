// The binders of the families of `cp`.
#pragma once

#include "core/binder.h"

namespace emulator {

void bind_cp_async(Binder& binder);       // cp.async, after "async"
void bind_cp_async_bulk(Binder& binder);  // cp.async.bulk, after "bulk"

}  // namespace emulator
