// Random numbers that are the same on every compiler: the standard's distributions are not.
#pragma once

#include <cstdint>
#include <random>

namespace rlhfuse {

class Random {
public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}

    // Uniform in [0, 1).
    double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

    // Uniform in 0 .. count - 1; the bias of the remainder is below 2^-40 for any real problem.
    int below(int count) { return static_cast<int>(engine_() % static_cast<std::uint64_t>(count)); }

    bool chance(double probability) { return unit() < probability; }

private:
    std::mt19937_64 engine_;
};

}  // namespace rlhfuse
