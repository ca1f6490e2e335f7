// The subtasks of a fusion problem as a network of streams, the form that the search works on.
//
// A stream is one kind (F, B or W) of one stage of one pipeline: `count` subtasks of equal
// duration, run in micro-batch order. Micro-batches of a pipeline are identical, so that order is
// no loss (megatron_rlhfuse/schedule/bounds.py proves it), and a device's order is no more than an
// interleaving of its streams.
//
// A network can be turned around in time: the reversed one has the same schedules, backwards.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace rlhfuse {

using Time = std::int64_t;
using Memory = std::int64_t;

inline constexpr Time kNever = std::numeric_limits<Time>::max();
inline constexpr Memory kNoLimit = std::numeric_limits<Memory>::max() / 4;

// Another stream whose subtask of the same micro-batch comes before or after, and the transfer time
// between the two. `stream` is -1 where there is none.
struct Link {
    int stream = -1;
    Time delay = 0;
};

struct Stream {
    int pipeline = 0;
    int device = 0;
    int slot = 0;   // the stage of the pipeline: its streams share a slot, which holds activations
    int count = 0;  // micro-batches
    int depth = 0;  // stages from this one to the last: what 1F1B keeps in flight here
    int first = 0;  // subtasks of the stream are first .. first + count - 1
    Time duration = 0;
    Memory activation = 0;
    bool acquires = false;  // takes `activation` when it starts
    bool releases = false;  // gives it back when it ends
    std::array<Link, 2> before;
    std::array<Link, 2> after;
};

struct Network {
    int devices = 0;
    int pipelines = 0;
    int slots = 0;
    int subtasks = 0;
    std::vector<Stream> streams;
    std::vector<std::vector<int>> on_device;  // streams of each device

    // Adds a stream; `pipeline`, `device`, `slot`, `count`, `duration` and the memory must be set.
    int add(Stream stream) {
        stream.first = subtasks;
        subtasks += stream.count;
        devices = std::max(devices, stream.device + 1);
        pipelines = std::max(pipelines, stream.pipeline + 1);
        slots = std::max(slots, stream.slot + 1);
        streams.push_back(stream);
        return static_cast<int>(streams.size()) - 1;
    }

    // Subtask k of `to` waits for subtask k of `from`. At most two links on either side.
    void connect(int from, int to, Time delay) {
        auto& after = streams[from].after;
        auto& before = streams[to].before;
        after[after[0].stream < 0 ? 0 : 1] = {to, delay};
        before[before[0].stream < 0 ? 0 : 1] = {from, delay};
    }

    void index_devices() {
        on_device.assign(devices, {});
        for (int s = 0; s < static_cast<int>(streams.size()); ++s) {
            on_device[streams[s].device].push_back(s);
        }
    }

    // The network backwards in time. Subtask k of a stream becomes subtask count - 1 - k.
    Network reversed() const {
        Network backwards = *this;
        for (Stream& stream : backwards.streams) {
            std::swap(stream.before, stream.after);
            std::swap(stream.acquires, stream.releases);
        }
        return backwards;
    }

    // Per stream, the shortest time from the start of its subtask to the end of its micro-batch.
    std::vector<Time> tails() const {
        std::vector<Time> tail(streams.size(), -1);
        for (int s = 0; s < static_cast<int>(streams.size()); ++s) {
            find_tail(s, tail);
        }
        return tail;
    }

private:
    void find_tail(int s, std::vector<Time>& tail) const {
        std::vector<int> stack{s};
        while (!stack.empty()) {
            const int top = stack.back();
            Time longest = 0;
            bool known = true;
            for (const Link& link : streams[top].after) {
                if (link.stream < 0) continue;
                if (tail[link.stream] < 0) {
                    stack.push_back(link.stream);
                    known = false;
                } else {
                    longest = std::max(longest, link.delay + tail[link.stream]);
                }
            }
            if (known) {
                tail[top] = longest + streams[top].duration;
                stack.pop_back();
            }
        }
    }
};

// Start of every subtask, the latest end, and the highest activation memory of any device.
struct Schedule {
    std::vector<Time> start;
    Time makespan = kNever;
    Memory peak = 0;
};

}  // namespace rlhfuse
