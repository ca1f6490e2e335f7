// Refuses a pass that would touch memory outside its tensors, or whose result would depend on
// timing. Messages name the field and the argument.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "fields.h"

namespace rlhfuse::packing {

namespace detail {

[[noreturn]] inline void refuse(std::size_t field, const std::string& argument,
                                const std::string& why) {
    throw std::invalid_argument("fields[" + std::to_string(field) + "]." + argument + ": " + why);
}

inline std::string place(int device) {
    return device == Array::host ? "the host" : "CUDA device " + std::to_string(device);
}

inline void check_array(std::size_t field, const char* name, const Array& array, const Type& type,
                        int device) {
    if (*array.type != type)
        refuse(field, name, std::string("want ") + type.name + ", got " + array.type->name);
    if (array.device != device)
        refuse(field, name, "want it on " + place(device) + ", is on " + place(array.device));
    if (array.elements < 0) refuse(field, name, "has a negative number of elements");
    if (array.elements > 0 && (array.data == nullptr || array.begin() % type.size != 0))
        refuse(field, name, "its address is not a multiple of its elements' size");
}

inline void check_table(std::size_t field, const char* name, const Array& table,
                        std::int64_t count) {
    check_array(field, name, table, type_named("int64"), Array::host);
    if (table.elements != count)
        refuse(field, name,
               "has " + std::to_string(table.elements) + " segments, lengths has " +
                   std::to_string(count));
}

// Every place is compared with what is left, so that no sum can overflow.
inline void check_segments(std::size_t number, const Field& field) {
    const Segments& segments = field.segments;
    check_table(number, "segments.lengths", segments.lengths, segments.lengths.elements);
    check_table(number, "segments.rooms", segments.rooms, segments.count());
    check_table(number, "segments.target_starts", segments.target_starts, segments.count());
    check_table(number, "segments.source_starts", segments.source_starts, segments.count());
    const std::int64_t *sources = segments.source_starts.int64s(),
                       *targets = segments.target_starts.int64s(),
                       *lengths = segments.lengths.int64s(), *rooms = segments.rooms.int64s();
    std::int64_t taken = 0;  // end of the room before
    for (std::int64_t i = 0; i < segments.count(); ++i) {
        const auto fault = [&](const char* name, const std::string& why) {
            refuse(number, "segments." + std::string(name) + "[" + std::to_string(i) + "]", why);
        };
        if (lengths[i] < 0) fault("lengths", "is negative: " + std::to_string(lengths[i]));
        if (lengths[i] > rooms[i])
            fault("lengths", std::to_string(lengths[i]) + " is longer than its room, " +
                                 std::to_string(rooms[i]));
        if (targets[i] < 0) fault("target_starts", "is negative: " + std::to_string(targets[i]));
        if (targets[i] < taken)
            fault("target_starts", std::to_string(targets[i]) +
                                       " is before the end of the room before, " +
                                       std::to_string(taken) + ": overlaps it or does not ascend");
        if (rooms[i] > field.target.elements || targets[i] > field.target.elements - rooms[i])
            fault("target_starts", std::to_string(targets[i]) + " with a room of " +
                                       std::to_string(rooms[i]) + " is beyond the target's " +
                                       std::to_string(field.target.elements) + " elements");
        taken = targets[i] + rooms[i];
        if (field.kind() == Kind::copy && (sources[i] < 0 || lengths[i] > field.source.elements ||
                                           sources[i] > field.source.elements - lengths[i]))
            fault("source_starts", std::to_string(sources[i]) + " with a length of " +
                                       std::to_string(lengths[i]) + " is beyond the source's " +
                                       std::to_string(field.source.elements) + " elements");
        if (field.kind() == Kind::positions && lengths[i] - 1 > field.target.type->most)
            fault("lengths", std::to_string(lengths[i]) + " has positions beyond " +
                                 field.target.type->name + "'s range");
    }
}

inline bool overlap(const Array& a, const Array& b) {
    return a.bytes() > 0 && b.bytes() > 0 && a.begin() < b.end() && b.begin() < a.end();
}

}  // namespace detail

// Throws std::invalid_argument; `device` is where all of the pass has to lie.
inline void check(const std::vector<Field>& fields, int device) {
    using detail::refuse;
    for (std::size_t i = 0; i < fields.size(); ++i) {
        const Field& field = fields[i];
        if (!field.target.given()) refuse(i, "target", "is missing");
        const Type& type = *field.target.type;
        detail::check_array(i, "target", field.target, type, device);
        if (!field.fill.given() || field.fill.elements != 1) refuse(i, "fill", "want one element");
        detail::check_array(i, "fill", field.fill, type, Array::host);
        if (field.source.given() && field.each.given())
            refuse(i, "each", "want it or a source, got both");
        if (field.source.given()) detail::check_array(i, "source", field.source, type, device);
        if (field.each.given()) {
            detail::check_array(i, "each", field.each, type, device);
            if (field.each.elements != field.segments.count())
                refuse(i, "each",
                       "has " + std::to_string(field.each.elements) + " values for " +
                           std::to_string(field.segments.count()) + " segments");
        }
        if (field.kind() == Kind::positions && !type.integer)
            refuse(i, "target", std::string("positions want an integer dtype, got ") + type.name);
        detail::check_segments(i, field);
    }
    for (std::size_t i = 0; i < fields.size(); ++i)
        for (std::size_t j = 0; j < fields.size(); ++j) {
            const std::string written = "shares memory with fields[" + std::to_string(j) +
                                        "].target, which the same pass writes";
            if (detail::overlap(fields[i].source, fields[j].target)) refuse(i, "source", written);
            if (detail::overlap(fields[i].each, fields[j].target)) refuse(i, "each", written);
        }
}

}  // namespace rlhfuse::packing
