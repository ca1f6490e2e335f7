// The kernel: a warp a part, the fields in the second dimension of the grid.
#include <algorithm>
#include <stdexcept>

#include "launch.h"

namespace rlhfuse::packing::cuda {
namespace {

constexpr int warps = 8;         // in a block
constexpr int resident = 3;      // blocks of a multiprocessor: as many as spill no registers
constexpr int most_fields = 32;  // in the 4 KiB that a kernel's parameters may have

struct Fields {
    FieldView at[most_fields];
};
static_assert(sizeof(Fields) <= 4096);

__global__ void __launch_bounds__(warps* lanes, resident)
    write_fields(const __grid_constant__ Fields fields) {
    const FieldView& field = fields.at[blockIdx.y];
    const std::int64_t part =
        static_cast<std::int64_t>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / lanes;
    if (part < field.parts) write_part(field, part, static_cast<int>(threadIdx.x) % lanes);
}

void require(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("packing: ") + what + ": " +
                                 cudaGetErrorString(status));
}

// Makes a device the current one and, at the end, the one that was.
class Current {
public:
    explicit Current(int device) {
        require(cudaGetDevice(&before_), "cudaGetDevice");
        require(cudaSetDevice(device), "cudaSetDevice");
    }
    ~Current() { cudaSetDevice(before_); }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

private:
    int before_ = 0;
};

}  // namespace

int devices() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        cudaGetLastError();  // so that no later call reports it
        return 0;
    }
    require(status, "cudaGetDeviceCount");
    return count;
}

std::vector<std::string> architectures() {
    std::vector<std::string> names;
    for (const int number : {__CUDA_ARCH_LIST__})
        names.push_back("sm_" + std::to_string(number / 10));
    return names;
}

void launch(const std::vector<FieldView>& fields, int device, void* stream) {
    const Current current(device);
    for (std::size_t first = 0; first < fields.size(); first += most_fields) {
        const std::size_t count = std::min<std::size_t>(most_fields, fields.size() - first);
        Fields given{};
        std::copy_n(fields.begin() + static_cast<std::ptrdiff_t>(first), count, given.at);
        std::int64_t parts = 0;
        for (std::size_t i = 0; i < count; ++i) parts = std::max(parts, given.at[i].parts);
        const std::int64_t blocks = (parts + warps - 1) / warps;
        if (blocks > INT32_MAX) throw std::runtime_error("packing: a field is too large");
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
        write_fields<<<grid, warps * lanes, 0, static_cast<cudaStream_t>(stream)>>>(given);
        require(cudaGetLastError(), "launch");
    }
}

}  // namespace rlhfuse::packing::cuda
