// What kernel.cu offers to module.cpp, without a header of CUDA's.
#pragma once

#include <string>
#include <vector>

#include "../segments.h"

namespace rlhfuse::packing::cuda {

// Devices that the driver shows; 0 without a driver.
int devices();

// What the kernel was compiled for, as in "sm_90".
std::vector<std::string> architectures();

// Queues a pass on a cudaStream_t of a device; one launch where it has at most 32 fields. Throws
// std::runtime_error.
void launch(const std::vector<FieldView>& fields, int device, void* stream);

}  // namespace rlhfuse::packing::cuda
