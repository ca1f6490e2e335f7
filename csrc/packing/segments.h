// A pass on a GPU, as one lane sees it.
//
// What a field writes is cut into parts of at most `part_bytes` within one segment's room; a warp
// writes a part. Its 16-byte chunks are the lanes' by turns. Chunks that the part's ends or the
// content's end cut through are written element by element.
//
// Invariants
// - a lane depends on no other one: every element of a room is written by one lane, once;
// - no load leaves the source tensor.
#pragma once

#include <cstdint>

#include "chunks.h"

namespace rlhfuse::packing {

enum class Kind : std::int32_t { copy, each, positions };

// Eight chunks a lane: enough to hide the look-up of the segment, little enough to keep small
// passes on many warps.
inline constexpr int part_bytes = 8 * lanes * chunk_bytes;

// A field whose addresses are all of the memory that lanes work on; tables are [segments].
struct FieldView {
    char* target;
    const char* source;
    const char* source_end;
    const char* each;
    const std::int64_t* source_starts;
    const std::int64_t* target_starts;
    const std::int64_t* lengths;
    const std::int64_t* rooms;
    const std::int64_t* first_parts;  // parts of all segments before
    std::int64_t segments;
    std::int64_t parts;
    std::uint64_t fill;  // an element's bits
    std::int32_t size;   // of an element
    Kind kind;
};

namespace detail {

RLHFUSE_HOST_DEVICE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

RLHFUSE_HOST_DEVICE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// The last segment that begins at or before a part; ones without room begin where the next does.
RLHFUSE_HOST_DEVICE std::int64_t segment_of(const FieldView& view, std::int64_t part) {
    std::int64_t low = 0, high = view.segments;
    while (high - low > 1) {
        const std::int64_t middle = low + (high - low) / 2;
        if (view.first_parts[middle] <= part)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// What belongs into one segment. `source` is at the segment's first element.
template <typename Element>
struct Content {
    Element* target;
    const Element* source;
    std::int64_t length;
    Kind kind;
    Element each;
    Element fill;

    RLHFUSE_HOST_DEVICE Element at(std::int64_t i) const {
        if (i >= length) return fill;
        if (kind == Kind::copy) return load<Element>(source + i);
        return kind == Kind::each ? each : static_cast<Element>(i);
    }
};

template <typename Element>
RLHFUSE_HOST_DEVICE Content<Element> content_of(const FieldView& view, std::int64_t segment) {
    Content<Element> content{};
    content.target = reinterpret_cast<Element*>(view.target) + view.target_starts[segment];
    content.length = view.lengths[segment];
    content.kind = view.kind;
    content.fill = static_cast<Element>(view.fill);
    if (view.kind == Kind::copy)
        content.source =
            reinterpret_cast<const Element*>(view.source) + view.source_starts[segment];
    else if (view.kind == Kind::each)
        content.each = load<Element>(view.each + segment * sizeof(Element));
    return content;
}

// [from, to) holds at most a chunk's elements: one a lane.
template <typename Element>
RLHFUSE_HOST_DEVICE void write_elements(const Content<Element>& content, std::int64_t from,
                                        std::int64_t to, int lane) {
    if (from + lane < to) store(content.target + from + lane, content.at(from + lane));
}

// Whole chunks [from, to) of a part's copied content.
template <typename Element>
RLHFUSE_HOST_DEVICE void copy_chunks(const Content<Element>& content, const FieldView& view,
                                     std::int64_t from, std::int64_t to, int lane) {
    constexpr std::int64_t step = chunk_elements<Element>;
    const auto bytes = static_cast<unsigned>(address(content.source + from) % chunk_bytes);
    // Aligned loads reach beyond the content; where that is beyond the tensor, none is done.
    if (bytes != 0 && from < to && address(content.source + from) - bytes < address(view.source)) {
        write_elements(content, from, from + step, lane);
        from += step;
    }
    if (bytes != 0 && from < to &&
        address(content.source + to) - bytes + chunk_bytes > address(view.source_end)) {
        to -= step;
        write_elements(content, to, to + step, lane);
    }
    auto* const target = reinterpret_cast<char*>(content.target + from);
    const auto* const source = reinterpret_cast<const char*>(content.source + from);
    const auto chunks = static_cast<int>((to - from) / step);
    if (bytes == 0)
        copy_aligned(target, source, chunks, lane);
    else
        copy_shifted(target, source, chunks, bytes, lane);
}

template <typename Element>
RLHFUSE_HOST_DEVICE void write_part(const FieldView& view, std::int64_t part, int lane) {
    constexpr std::int64_t step = chunk_elements<Element>;
    constexpr std::int64_t elements = part_bytes / static_cast<int>(sizeof(Element));
    const std::int64_t segment = segment_of(view, part);
    const Content<Element> content = content_of<Element>(view, segment);
    const std::int64_t from = (part - view.first_parts[segment]) * elements;
    const std::int64_t to = smaller(from + elements, view.rooms[segment]);
    // In order: elements up to an aligned address, chunks of content, elements of the chunk that
    // the content ends in, chunks of fill, elements of a last chunk.
    const auto before =
        static_cast<std::int64_t>((chunk_bytes - address(content.target + from) % chunk_bytes) %
                                  chunk_bytes / sizeof(Element));
    const std::int64_t body = smaller(to, from + before);
    const std::int64_t body_end = body + (to - body) / step * step;
    const std::int64_t content_end = smaller(larger(content.length, body), body_end);
    const std::int64_t full = body + (content_end - body) / step * step;
    const std::int64_t padding = content_end == full ? full : full + step;
    write_elements(content, from, body, lane);
    if (content.kind == Kind::copy)
        copy_chunks(content, view, body, full, lane);
    else if (content.kind == Kind::each)
        repeat(content.target, content.each, body, full, lane);
    else
        count(content.target, body, full, lane);
    write_elements(content, full, padding, lane);
    repeat(content.target, content.fill, padding, body_end, lane);
    write_elements(content, body_end, to, lane);
}

}  // namespace detail

// What a lane writes of a part, 0 <= part < view.parts.
RLHFUSE_HOST_DEVICE void write_part(const FieldView& view, std::int64_t part, int lane) {
    switch (view.size) {
        case 1:
            detail::write_part<std::uint8_t>(view, part, lane);
            break;
        case 2:
            detail::write_part<std::uint16_t>(view, part, lane);
            break;
        case 4:
            detail::write_part<std::uint32_t>(view, part, lane);
            break;
        default:
            detail::write_part<std::uint64_t>(view, part, lane);
    }
}

}  // namespace rlhfuse::packing
