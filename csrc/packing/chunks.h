// Sixteen bytes at a time: what a lane of a warp loads, makes and stores. Free of CUDA's own names
// where a host compiles it, so that a test there can play all lanes one after the other.
//
// Invariant
// - 16-byte accesses are aligned; on the host an assertion sees to it.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RLHFUSE_HOST_DEVICE __host__ __device__ __forceinline__
#define RLHFUSE_UNROLL _Pragma("unroll")
#else
#define RLHFUSE_HOST_DEVICE inline
#define RLHFUSE_UNROLL
#endif

namespace rlhfuse::packing {

inline constexpr int lanes = 32;
inline constexpr int chunk_bytes = 16;
// Loads of a lane that wait for memory together.
inline constexpr int in_flight = 4;

namespace detail {

struct alignas(chunk_bytes) Chunk {
    std::uint32_t words[4];
};

RLHFUSE_HOST_DEVICE std::uintptr_t address(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer);
}

template <typename Value>
RLHFUSE_HOST_DEVICE Value load(const void* from) {
#ifdef __CUDA_ARCH__
    return *static_cast<const Value*>(from);
#else
    assert(address(from) % sizeof(Value) == 0);
    Value value;
    std::memcpy(&value, from, sizeof(Value));
    return value;
#endif
}

template <typename Value>
RLHFUSE_HOST_DEVICE void store(void* to, const Value& value) {
#ifdef __CUDA_ARCH__
    *static_cast<Value*>(to) = value;
#else
    assert(address(to) % sizeof(Value) == 0);
    std::memcpy(to, &value, sizeof(Value));
#endif
}

#ifdef __CUDA_ARCH__
// The compiler splits some assignments of chunks into stores of words; this it leaves whole.
RLHFUSE_HOST_DEVICE void store(void* to, const Chunk& chunk) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(chunk.words[0]), "r"(chunk.words[1]), "r"(chunk.words[2]), "r"(chunk.words[3])
                 : "memory");
}
#endif

template <typename Element>
inline constexpr std::int64_t chunk_elements = chunk_bytes / static_cast<int>(sizeof(Element));

template <typename Element>
RLHFUSE_HOST_DEVICE Chunk repeated(Element value) {
    std::uint64_t bits = value;
    RLHFUSE_UNROLL
    for (int width = 8 * sizeof(Element); width < 64; width *= 2) bits |= bits << width;
    const auto low = static_cast<std::uint32_t>(bits),
               high = static_cast<std::uint32_t>(bits >> 32);
    return {{low, high, low, high}};
}

template <typename Element>
RLHFUSE_HOST_DEVICE Chunk counted(std::int64_t first) {
    Chunk chunk{};
    constexpr int in_word = 4 / static_cast<int>(sizeof(Element));
    RLHFUSE_UNROLL
    for (int word = 0; word < 4; ++word) {
        if constexpr (sizeof(Element) == 8)
            chunk.words[word] =
                static_cast<std::uint32_t>((first + word / 2) >> (word % 2 ? 32 : 0));
        else
            for (int i = 0; i < in_word; ++i)
                chunk.words[word] |=
                    static_cast<std::uint32_t>(static_cast<Element>(first + word * in_word + i))
                    << (8 * sizeof(Element) * i);
    }
    return chunk;
}

// The 16 bytes that begin `bytes` (1 to 15) behind the first of two neighbouring chunks.
RLHFUSE_HOST_DEVICE Chunk shifted(const Chunk& low, const Chunk& high, unsigned bytes) {
    std::uint32_t words[8];
    RLHFUSE_UNROLL
    for (int i = 0; i < 4; ++i) {
        words[i] = low.words[i];
        words[4 + i] = high.words[i];
    }
    // By selections with fixed indices: an index that varies would put the words into memory.
    RLHFUSE_UNROLL
    for (int i = 0; i < 6; ++i) words[i] = bytes & 8 ? words[i + 2] : words[i];
    RLHFUSE_UNROLL
    for (int i = 0; i < 5; ++i) words[i] = bytes & 4 ? words[i + 1] : words[i];
    Chunk chunk;
    RLHFUSE_UNROLL
    for (int i = 0; i < 4; ++i)
        chunk.words[i] = static_cast<std::uint32_t>(
            (static_cast<std::uint64_t>(words[i + 1]) << 32 | words[i]) >> (8 * (bytes & 3)));
    return chunk;
}

// Chunks from a source that is aligned as the target is.
RLHFUSE_HOST_DEVICE void copy_aligned(char* target, const char* source, int chunks, int lane) {
    for (int i = lane; i < chunks; i += in_flight * lanes) {
        Chunk held[in_flight];
        RLHFUSE_UNROLL
        for (int k = 0; k < in_flight; ++k)
            if (i + k * lanes < chunks)
                held[k] = load<Chunk>(source + (i + k * lanes) * chunk_bytes);
        RLHFUSE_UNROLL
        for (int k = 0; k < in_flight; ++k)
            if (i + k * lanes < chunks) store(target + (i + k * lanes) * chunk_bytes, held[k]);
    }
}

// Chunks from a source that begins `bytes` behind an aligned address.
RLHFUSE_HOST_DEVICE void copy_shifted(char* target, const char* source, int chunks, unsigned bytes,
                                      int lane) {
    constexpr int at_once = in_flight / 2;
    const char* const aligned = source - bytes;
    for (int i = lane; i < chunks; i += at_once * lanes) {
        Chunk low[at_once], high[at_once];
        RLHFUSE_UNROLL
        for (int k = 0; k < at_once; ++k)
            if (i + k * lanes < chunks) {
                low[k] = load<Chunk>(aligned + (i + k * lanes) * chunk_bytes);
                high[k] = load<Chunk>(aligned + (i + k * lanes + 1) * chunk_bytes);
            }
        RLHFUSE_UNROLL
        for (int k = 0; k < at_once; ++k)
            if (i + k * lanes < chunks)
                store(target + (i + k * lanes) * chunk_bytes, shifted(low[k], high[k], bytes));
    }
}

// One value in the elements [from, to) of a part, which are whole chunks.
template <typename Element>
RLHFUSE_HOST_DEVICE void repeat(Element* target, Element value, std::int64_t from, std::int64_t to,
                                int lane) {
    const Chunk chunk = repeated(value);
    auto* const first = reinterpret_cast<char*>(target + from);
    const auto chunks = static_cast<int>((to - from) / chunk_elements<Element>);
    for (int i = lane; i < chunks; i += lanes) store(first + i * chunk_bytes, chunk);
}

// Likewise, in each element its own index.
template <typename Element>
RLHFUSE_HOST_DEVICE void count(Element* target, std::int64_t from, std::int64_t to, int lane) {
    auto* const first = reinterpret_cast<char*>(target + from);
    const auto chunks = static_cast<int>((to - from) / chunk_elements<Element>);
    for (int i = lane; i < chunks; i += lanes)
        store(first + i * chunk_bytes, counted<Element>(from + i * chunk_elements<Element>));
}

}  // namespace detail

}  // namespace rlhfuse::packing
