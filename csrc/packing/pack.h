// A pass on the host: the bytes it writes are cut into equal shares, which threads take by turns,
// so that one that starts late does not keep the others waiting.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "fields.h"
#include "stream.h"

namespace rlhfuse::packing {

// From how many written bytes on; both measured on two cores with 32 MiB of last-level cache.
struct Thresholds {
    std::int64_t share = 2 << 20;    // a thread is worth its start, some 40 us
    std::int64_t stream = 16 << 20;  // a pass had better not go through the caches
};

namespace detail {

// Few: each looks for its first segment from the start of the field on.
inline constexpr std::int64_t shares_of_a_thread = 8;

// Writes one field, on one thread.
template <typename Element>
class Writer {
public:
    Writer(const Field& field, bool streams)
        : count_(field.segments.count()),
          kind_(field.kind()),
          streams_(streams),
          target_(reinterpret_cast<Element*>(field.target.data)),
          source_(reinterpret_cast<const Element*>(field.source.data)),
          each_(reinterpret_cast<const Element*>(field.each.data)),
          fill_(static_cast<Element>(field.fill_bits())),
          source_starts_(field.segments.source_starts.int64s()),
          target_starts_(field.segments.target_starts.int64s()),
          lengths_(field.segments.lengths.int64s()),
          rooms_(field.segments.rooms.int64s()) {}

    // The bytes [first, last) of what the field writes, its rooms one behind the other. A cut
    // within an element leaves the element to the share before.
    void share(std::int64_t first, std::int64_t last) const {
        constexpr std::int64_t size = sizeof(Element);
        const std::int64_t begin = (first + size - 1) / size, end = (last + size - 1) / size;
        std::int64_t start = 0;
        for (std::int64_t i = 0; i < count_ && start < end; start += rooms_[i++]) {
            const std::int64_t from = std::max<std::int64_t>(begin - start, 0);
            const std::int64_t to = std::min(end - start, rooms_[i]);
            if (from < to) write(i, from, to);
        }
    }

private:
    // Elements [from, to) of a room.
    void write(std::int64_t segment, std::int64_t from, std::int64_t to) const {
        const std::int64_t length = lengths_[segment];
        Element* const target = target_ + target_starts_[segment];
        if (const std::int64_t end = std::min(to, length); from < end) {
            if (kind_ == Kind::copy)
                copy(target + from, source_ + source_starts_[segment] + from, end - from, segment);
            else if (kind_ == Kind::each)
                fill(target + from, each_[segment], end - from);
            else
                for (std::int64_t i = from; i < end; ++i) target[i] = static_cast<Element>(i);
        }
        if (const std::int64_t begin = std::max(from, length); begin < to)
            fill(target + begin, fill_, to - begin);
    }

    void copy(Element* target, const Element* source, std::int64_t count,
              std::int64_t segment) const {
        const auto bytes = count * static_cast<std::int64_t>(sizeof(Element));
        if (!streams_) {
            std::memcpy(target, source, bytes);
            return;
        }
        if (segment + 1 < count_)
            prefetch(reinterpret_cast<const char*>(source_ + source_starts_[segment + 1]));
        stream_copy(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(source), bytes);
    }

    void fill(Element* target, Element value, std::int64_t count) const {
        if (!streams_) {
            std::fill_n(target, count, value);
            return;
        }
        char pattern[16];
        for (std::size_t i = 0; i < sizeof(pattern); i += sizeof(Element))
            std::memcpy(pattern + i, &value, sizeof(Element));
        stream_fill(reinterpret_cast<char*>(target), pattern,
                    count * static_cast<std::int64_t>(sizeof(Element)));
    }

    std::int64_t count_;
    Kind kind_;
    bool streams_;
    Element* target_;
    const Element *source_, *each_;
    Element fill_;
    const std::int64_t *source_starts_, *target_starts_, *lengths_, *rooms_;
};

inline std::int64_t written_bytes(const Field& field) {
    const std::int64_t* rooms = field.segments.rooms.int64s();
    std::int64_t elements = 0;
    for (std::int64_t i = 0; i < field.segments.count(); ++i) elements += rooms[i];
    return elements * field.target.type->size;
}

inline void write_share(const Field& field, bool streams, std::int64_t first, std::int64_t last) {
    switch (field.target.type->size) {
        case 1:
            Writer<std::uint8_t>(field, streams).share(first, last);
            break;
        case 2:
            Writer<std::uint16_t>(field, streams).share(first, last);
            break;
        case 4:
            Writer<std::uint32_t>(field, streams).share(first, last);
            break;
        default:
            Writer<std::uint64_t>(field, streams).share(first, last);
    }
}

}  // namespace detail

// Fields as check() accepts them, on the host, with at most so many threads, the caller's included.
inline void move(const std::vector<Field>& fields, std::int64_t threads,
                 const Thresholds& from = {}) {
    std::vector<std::int64_t> ends;  // of the fields' bytes, one behind the other
    std::int64_t total = 0;
    for (const Field& field : fields) ends.push_back(total += detail::written_bytes(field));
    const std::int64_t workers = std::max<std::int64_t>(1, std::min(threads, total / from.share));
    const std::int64_t shares = workers == 1 ? 1 : workers * detail::shares_of_a_thread;
    const auto cut = [&](std::int64_t i) {
        return total / shares * i + std::min(i, total % shares);
    };
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
        for (std::int64_t i = next++; i < shares; i = next++) {
            std::int64_t begin = 0;
            for (std::size_t f = 0; f < fields.size(); begin = ends[f++]) {
                const std::int64_t first = std::max(cut(i), begin);
                const std::int64_t last = std::min(cut(i + 1), ends[f]);
                if (first < last)
                    detail::write_share(fields[f], total >= from.stream, first - begin,
                                        last - begin);
            }
        }
        stream_end();
    };
    std::vector<std::thread> helpers;
    try {
        while (static_cast<std::int64_t>(helpers.size()) < workers - 1) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: fewer take all shares
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace rlhfuse::packing
