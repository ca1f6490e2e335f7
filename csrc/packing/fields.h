// What a pass moves: fields of segments, as Python describes them. Addresses are plain numbers
// here; checks.h looks at them before anything reads or writes there.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "segments.h"

namespace rlhfuse::packing {

struct Type {
    const char* name;
    std::int32_t size;  // bytes of an element
    bool integer;
    std::int64_t most;  // that positions may reach
};

// By name: each extension module has its own table of types, and they pass each other arrays.
inline bool operator==(const Type& a, const Type& b) { return std::strcmp(a.name, b.name) == 0; }
inline bool operator!=(const Type& a, const Type& b) { return !(a == b); }

inline constexpr Type types[] = {
    {"int64", 8, true, INT64_MAX}, {"int32", 4, true, INT32_MAX}, {"int16", 2, true, INT16_MAX},
    {"uint8", 1, true, UINT8_MAX}, {"bool", 1, false, 0},         {"float16", 2, false, 0},
    {"bfloat16", 2, false, 0},     {"float32", 4, false, 0},      {"float64", 8, false, 0},
};

inline const Type& type_named(const std::string& name) {
    for (const Type& type : types)
        if (name == type.name) return type;
    throw std::invalid_argument("dtype: want a real one of at most 8 bytes, got " + name);
}

// A contiguous tensor, or nothing: an optional one that is not given has no type.
struct Array {
    static constexpr int host = -1;

    char* data = nullptr;
    const Type* type = nullptr;
    std::int64_t elements = 0;
    int device = host;  // else the number of a CUDA device

    Array() = default;
    Array(std::uintptr_t address, const std::string& dtype, std::int64_t elements, int device)
        : data(reinterpret_cast<char*>(address)),
          type(&type_named(dtype)),
          elements(elements),
          device(device) {}

    bool given() const { return type != nullptr; }
    std::int64_t bytes() const { return given() ? elements * type->size : 0; }
    std::uintptr_t begin() const { return reinterpret_cast<std::uintptr_t>(data); }
    std::uintptr_t end() const { return begin() + static_cast<std::uintptr_t>(bytes()); }
    const std::int64_t* int64s() const { return reinterpret_cast<const std::int64_t*>(data); }
};

// Host tables, all int64 [count]: target[target_start : +length] = source[source_start : +length],
// target[target_start + length : target_start + room] = fill.
struct Segments {
    Array source_starts, target_starts, lengths, rooms;

    std::int64_t count() const { return lengths.elements; }
};

struct Field {
    Segments segments;
    Array target;
    Array fill;    // one element, on the host
    Array source;  // or
    Array each;    // one element a segment; with neither, positions

    Kind kind() const {
        return source.given() ? Kind::copy : each.given() ? Kind::each : Kind::positions;
    }

    std::uint64_t fill_bits() const {
        std::uint64_t bits = 0;
        std::memcpy(&bits, fill.data, target.type->size);
        return bits;
    }
};

}  // namespace rlhfuse::packing
