// What a choice needs to know of a device. Numbers, so that every choice can be tested where there is none.
#pragma once

namespace basisconv {

struct CudaDevice {
  int capability;    // 10 * major + minor
  int shared_bytes;  // of one block, the limit that a kernel may ask for
  int multiprocessors;
};

// Null on success. The attributes are asked for once a device and process.
const char* cuda_device(int index, CudaDevice* found);

}  // namespace basisconv
