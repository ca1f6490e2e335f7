// Checks of packing in C++, built with sanitizers by test_csrc.py: the host's pass, and the GPU's
// with all of its lanes played one after the other, against the definition, on random segments of
// every kind, element size and alignment. A tensor ends where its memory does, so that the
// sanitizer sees what reaches beyond.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "checks.h"
#include "pack.h"
#include "table.h"

using namespace rlhfuse::packing;

namespace {

using Random = std::mt19937_64;
using Table64 = std::vector<std::int64_t>;
constexpr Thresholds never{INT64_MAX, INT64_MAX}, always{1, 0}, threads_only{1, INT64_MAX};

std::int64_t below(Random& random, std::int64_t end) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(end));
}

// A tensor of random bytes whose address is `place` behind a multiple of 16.
class Tensor {
public:
    Tensor(Random& random, const Type& type, std::int64_t elements, std::int64_t place)
        : type_(type), elements_(elements), place_(place), memory_(new char[place + bytes()]) {
        for (std::int64_t i = 0; i < bytes(); ++i) data()[i] = static_cast<char>(random());
        ASAN_POISON_MEMORY_REGION(memory_.get(), place_);
    }
    Tensor(Tensor&&) = default;
    ~Tensor() {
        if (memory_) ASAN_UNPOISON_MEMORY_REGION(memory_.get(), place_);
    }

    char* data() const { return memory_.get() + place_; }
    std::int64_t bytes() const { return elements_ * type_.size; }
    std::vector<char> copy() const { return {data(), data() + bytes()}; }
    Array array(int device) const {
        return {reinterpret_cast<std::uintptr_t>(data()), type_.name, elements_, device};
    }

private:
    const Type& type_;
    std::int64_t elements_, place_;
    std::unique_ptr<char[]> memory_;
};

// A field with its memory, and what its target has to be.
struct Case {
    Case(Random& random, const Type& type, Kind kind)
        : kind(kind), segments(below(random, 6)), size(type.size) {
        std::int64_t end = below(random, 20), longest = 0;
        // Mostly some chunks, at times some parts.
        const std::int64_t scale = below(random, 4) ? 70 : 3 * part_bytes / size;
        for (std::int64_t i = 0; i < segments; ++i) {
            lengths.push_back(below(random, 4) ? below(random, scale) : below(random, 2));
            if (size == 1 && kind == Kind::positions)
                lengths.back() = std::min<std::int64_t>(lengths.back(), 256);
            rooms.push_back(lengths.back() + (below(random, 2) ? 0 : below(random, scale)));
            target_starts.push_back(end);
            end += rooms.back() + (below(random, 2) ? 0 : below(random, 20));
            longest = std::max(longest, lengths.back());
        }
        const std::int64_t elements = longest + below(random, 40);
        for (const std::int64_t length : lengths)
            source_starts.push_back(below(random, elements - length + 1));
        const auto tensor = [&](std::int64_t count) {
            return Tensor(random, type, count, size * below(random, 32 / size));
        };
        tensors.push_back(tensor(end + below(random, 20)));
        tensors.push_back(tensor(1));
        tensors.push_back(tensor(elements));
        tensors.push_back(tensor(segments));
        before = tensors[0].copy();
        expect();
    }

    void expect() {
        wanted = before;
        for (std::int64_t i = 0; i < segments; ++i)
            for (std::int64_t j = 0; j < rooms[i]; ++j) {
                const std::uint64_t position = j;  // little-endian: its low bytes come first
                const char* from = reinterpret_cast<const char*>(&position);
                if (j >= lengths[i])
                    from = tensors[1].data();
                else if (kind == Kind::copy)
                    from = tensors[2].data() + (source_starts[i] + j) * size;
                else if (kind == Kind::each)
                    from = tensors[3].data() + i * size;
                std::memcpy(wanted.data() + (target_starts[i] + j) * size, from, size);
            }
    }

    Field field(int device) {
        const auto table = [](Table64& values) {
            return Array(reinterpret_cast<std::uintptr_t>(values.data()), "int64",
                         static_cast<std::int64_t>(values.size()), Array::host);
        };
        Field field;
        field.segments = {table(source_starts), table(target_starts), table(lengths), table(rooms)};
        field.target = tensors[0].array(device);
        field.fill = tensors[1].array(Array::host);
        if (kind == Kind::copy) field.source = tensors[2].array(device);
        if (kind == Kind::each) field.each = tensors[3].array(device);
        return field;
    }

    void restore() { std::copy(before.begin(), before.end(), tensors[0].data()); }
    bool right() const { return tensors[0].copy() == wanted; }

    Kind kind;
    std::int64_t segments;
    std::int32_t size;
    Table64 source_starts, target_starts, lengths, rooms;
    std::vector<Tensor> tensors;  // target, fill, source, each
    std::vector<char> before, wanted;
};

// What the kernel does, on one thread.
void play(const std::vector<Field>& fields) {
    const Table table(fields);
    Table64 buffer(table.elements());
    table.write(buffer.data());
    for (const FieldView& view : table.views(buffer.data()))
        for (std::int64_t part = 0; part < view.parts; ++part)
            for (int lane = 0; lane < lanes; ++lane) write_part(view, part, lane);
}

template <typename Run>
void require(std::vector<Case>& cases, const char* what, int trial, int device, Run run) {
    std::vector<Field> fields;
    for (Case& each : cases) {
        each.restore();
        fields.push_back(each.field(device));
    }
    check(fields, device);
    run(fields);
    for (const Case& each : cases)
        if (!each.right()) {
            std::printf("%s: trial %d, kind %d, %d bytes an element\n", what, trial,
                        static_cast<int>(each.kind), each.size);
            std::exit(1);
        }
}

}  // namespace

int main() {
    Random random(1);
    for (int trial = 0; trial < 6000; ++trial) {
        std::vector<Case> cases;
        const std::int64_t fields = 1 + below(random, 3);
        for (std::int64_t i = 0; i < fields; ++i)
            cases.emplace_back(random, types[below(random, 4)],
                               static_cast<Kind>(below(random, 3)));
        const auto on_host = [&](std::int64_t threads, const Thresholds& thresholds) {
            return [=](const std::vector<Field>& given) { move(given, threads, thresholds); };
        };
        require(cases, "one thread", trial, Array::host, on_host(4, never));
        require(cases, "streamed", trial, Array::host, on_host(1, always));
        require(cases, "lanes", trial, 0, play);
        if (trial % 20) continue;  // threads are slow to start under a sanitizer
        require(cases, "threads", trial, Array::host, on_host(4, threads_only));
        require(cases, "streamed by threads", trial, Array::host, on_host(3, always));
    }
    std::puts("ok");
}
