// A pass's tables in one buffer, so that one upload brings them to a GPU. Fields that share
// segments share rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fields.h"

namespace rlhfuse::packing {

class Table {
public:
    // Host tables of the fields are read by write(), later.
    explicit Table(const std::vector<Field>& fields) : fields_(fields) {
        for (const Field& field : fields) {
            const Segments& segments = field.segments;
            Rows rows;
            // Only copies look at their sources' starts: spare the others an upload.
            if (field.kind() == Kind::copy) rows.source_starts = row(segments.source_starts, 0);
            rows.target_starts = row(segments.target_starts, 0);
            rows.lengths = row(segments.lengths, 0);
            rows.rooms = row(segments.rooms, 0);
            rows.first_parts = row(segments.rooms, part_bytes / field.target.type->size);
            rows_.push_back(rows);
        }
    }

    // int64s that the buffer holds.
    std::int64_t elements() const { return elements_; }

    void write(std::int64_t* buffer) const {
        for (const Row& row : distinct_) {
            if (row.part_elements == 0) {
                std::copy_n(row.values, row.count, buffer + row.start);
                continue;
            }
            std::int64_t parts = 0;
            for (std::int64_t i = 0; i < row.count; ++i) {
                buffer[row.start + i] = parts;
                parts += parts_of(row.values[i], row.part_elements);
            }
        }
    }

    // The fields with their tables in `buffer`, an address where lanes read; those without parts
    // are left out.
    std::vector<FieldView> views(const std::int64_t* buffer) const {
        std::vector<FieldView> views;
        for (std::size_t i = 0; i < fields_.size(); ++i) {
            const Field& field = fields_[i];
            const Rows& rows = rows_[i];
            FieldView view{};
            view.target = field.target.data;
            view.source = field.source.data;
            view.source_end = field.source.data + field.source.bytes();
            view.each = field.each.data;
            view.source_starts = buffer + rows.source_starts;
            view.target_starts = buffer + rows.target_starts;
            view.lengths = buffer + rows.lengths;
            view.rooms = buffer + rows.rooms;
            view.first_parts = buffer + rows.first_parts;
            view.segments = field.segments.count();
            for (std::int64_t j = 0; j < view.segments; ++j)
                view.parts += parts_of(field.segments.rooms.int64s()[j],
                                       part_bytes / field.target.type->size);
            view.fill = field.fill_bits();
            view.size = field.target.type->size;
            view.kind = field.kind();
            if (view.parts > 0) views.push_back(view);
        }
        return views;
    }

private:
    struct Row {
        const std::int64_t* values;
        std::int64_t count;
        std::int64_t part_elements;  // 0: the values themselves; else the parts before each room
        std::int64_t start;          // in the buffer
    };

    // Where a field's rows start.
    struct Rows {
        std::int64_t source_starts = 0, target_starts = 0, lengths = 0, rooms = 0, first_parts = 0;
    };

    static std::int64_t parts_of(std::int64_t room, std::int64_t part_elements) {
        return room / part_elements + (room % part_elements != 0);
    }

    std::int64_t row(const Array& table, std::int64_t part_elements) {
        for (const Row& known : distinct_)
            if (known.values == table.int64s() && known.count == table.elements &&
                known.part_elements == part_elements)
                return known.start;
        distinct_.push_back({table.int64s(), table.elements, part_elements, elements_});
        elements_ += table.elements;
        return distinct_.back().start;
    }

    std::vector<Field> fields_;
    std::vector<Rows> rows_;
    std::vector<Row> distinct_;
    std::int64_t elements_ = 0;
};

}  // namespace rlhfuse::packing
