// Copies and fills of large passes, past the caches. Plain stores read every line before they write
// it, which a pass larger than the caches pays for: stores that do not ask for the line are half
// again as fast. Samples are short for the processor's own prefetching, so it is helped.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace rlhfuse::packing {

#if defined(__SSE2__)

namespace detail {

inline constexpr std::int64_t line = 64;
inline constexpr std::int64_t least_streamed = 4 * line;  // of a segment; less is not worth a head
inline constexpr std::int64_t ahead = 512;

inline std::int64_t to_line(const char* pointer) {
    return static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(pointer) % line);
}

}  // namespace detail

// Of a source that is read next.
inline void prefetch(const char* source) {
    for (std::int64_t i = 0; i < detail::ahead; i += detail::line)
        _mm_prefetch(source + i, _MM_HINT_T0);
}

inline void stream_copy(char* target, const char* source, std::int64_t bytes) {
    if (bytes < detail::least_streamed) {
        std::memcpy(target, source, bytes);
        return;
    }
    const std::int64_t head = detail::to_line(target);
    std::memcpy(target, source, head);
    std::int64_t i = head;
    for (; i + detail::line <= bytes; i += detail::line) {
        _mm_prefetch(source + i + detail::ahead, _MM_HINT_NTA);
        const auto* from = reinterpret_cast<const __m128i*>(source + i);
        auto* to = reinterpret_cast<__m128i*>(target + i);
        const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1),
                      c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
    std::memcpy(target + i, source + i, bytes - i);
}

// `pattern` is repeated; its period divides 16 bytes, and `target` is at a multiple of the period.
inline void stream_fill(char* target, const char (&pattern)[16], std::int64_t bytes) {
    const std::int64_t head = bytes < detail::line ? bytes : detail::to_line(target);
    std::int64_t i = 0;
    const auto plain = [&](std::int64_t end) {
        for (; i < end; i += 16) std::memcpy(target + i, pattern, end - i < 16 ? end - i : 16);
        i = end;
    };
    plain(head);
    // A head is whole periods, so the pattern starts anew behind it.
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pattern));
    for (; i + detail::line <= bytes; i += detail::line)
        for (std::int64_t k = 0; k < detail::line; k += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + k), value);
    plain(bytes);
}

// Before another thread may read what was streamed.
inline void stream_end() { _mm_sfence(); }

#else

inline void prefetch(const char*) {}

inline void stream_copy(char* target, const char* source, std::int64_t bytes) {
    std::memcpy(target, source, bytes);
}

inline void stream_fill(char* target, const char (&pattern)[16], std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 16)
        std::memcpy(target + i, pattern, bytes - i < 16 ? bytes - i : 16);
}

inline void stream_end() {}

#endif

}  // namespace rlhfuse::packing
