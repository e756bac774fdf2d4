// The CPU side of csrc/cuda/device.h and hopper.h: the same names as plain functions. See docs/cuda_on_cpu.md.
//
//   fibers.h  a block's threads as fibers on one thread of the machine, barriers, deadlocks
//   warp.h    what 32 lanes do together: shuffles, ldmatrix, mma
//   async.h   cp.async, delivered as late as a kernel allows
//   hopper.h  mbarriers, bulk and tensor-map copies, wgmma
#pragma once
#include "async.h"
#include "fibers.h"
#include "hopper.h"
#include "warp.h"
