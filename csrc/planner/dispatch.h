// List scheduling of a network under memory caps: the constructive half of the search.
//
// Invariants
// - Every precedence, device and cap holds. A careful run schedules every subtask, without a
//   deadlock: a subtask that takes memory leaves room for one micro-batch in every slot, still
//   empty, of each pipeline of the same or a higher rank, so the pipeline of the highest rank that
//   is not done can always go on.
// - A run that has failed has the makespan kNever. One that is not careful may fail, as may one
//   that reserves by key, and any under caps that do not admit a micro-batch of each pipeline
//   alone.
// - The result depends on network, caps, keys and policy only.
#pragma once

#include <queue>

#include "network.h"

namespace rlhfuse {

// How a device chooses among the subtasks that are or will soon be ready.
struct Policy {
    // 0 never waits while something is ready; 1 waits for a subtask of smaller key as long as the
    // earliest possible end on the device is not delayed beyond its start (Giffler and Thompson's
    // active schedules, 1960); between them hybrids (Storer, Wu and Vaccari, 1992).
    double patience = 0.0;
    // A subtask that takes memory starts no earlier than its key time less this.
    Time window = kNever;
    // A subtask that takes memory leaves room for those of smaller key on its device.
    bool reserve_by_key = false;
    // Leave the room that keeps it from running into a deadlock. Without, it may take memory that
    // the invariant above forbids, and fail.
    bool careful = true;
    // No slot holds more micro-batches than 1F1B would.
    bool limit_depth = false;
    // Pipelines by rank, 0 the highest; [pipelines].
    std::vector<int> rank;
};

class Dispatcher {
public:
    explicit Dispatcher(const Network& network) : network_(network) {
        const auto streams = network.streams.size();
        head_.resize(streams);
        ready_.resize(streams);
        fits_.resize(streams);
        allocators_.resize(network.devices);
        in_flight_.resize(network.slots);
        for (int s = 0; s < static_cast<int>(streams); ++s) {
            if (network.streams[s].acquires) {
                allocators_[network.streams[s].device].push_back(s);
            }
        }
        free_.resize(network.devices);
        used_.resize(network.devices);
        due_.resize(network.devices);
    }

    // Schedules all subtasks. `key`: smaller goes first, [subtasks]. `caps`: memory, [devices].
    void run(const std::vector<Time>& key, const std::vector<Memory>& caps, const Policy& policy,
             Schedule& out) {
        key_ = &key;
        caps_ = &caps;
        policy_ = &policy;
        start_ = &out.start;
        out.start.resize(network_.subtasks);
        out.makespan = 0;
        peak_ = 0;
        std::fill(head_.begin(), head_.end(), 0);
        std::fill(in_flight_.begin(), in_flight_.end(), 0);
        std::fill(free_.begin(), free_.end(), Time{0});
        std::fill(used_.begin(), used_.end(), Memory{0});
        std::fill(due_.begin(), due_.end(), kNever);
        queue_.clear();
        for (std::size_t s = 0; s < head_.size(); ++s) ready_[s] = find_ready(static_cast<int>(s));
        std::fill(fits_.begin(), fits_.end(), 1);
        for (int device = 0; device < network_.devices; ++device) {
            refresh_fits(device);
            queue_up(device);
        }
        int left = network_.subtasks;
        while (!queue_.empty()) {
            const auto [time, device] = queue_.front();
            std::pop_heap(queue_.begin(), queue_.end(), std::greater<>{});
            queue_.pop_back();
            if (due_[device] != time) continue;
            due_[device] = kNever;
            const int chosen = choose(device, time);
            const Time end = execute(chosen);
            --left;
            out.makespan = std::max(out.makespan, end);
            queue_up(device);
            for (const Link& link : network_.streams[chosen].after) {
                if (link.stream < 0) continue;
                // A head that waited for this subtask may be ready now.
                if (ready_[link.stream] == kNever) {
                    ready_[link.stream] = find_ready(link.stream);
                    queue_up(network_.streams[link.stream].device);
                }
            }
        }
        out.peak = peak_;
        if (left > 0) out.makespan = kNever;
    }

private:
    using Due = std::pair<Time, int>;

    // When the precedences of the head of a stream are met; kNever where one is not scheduled yet.
    Time find_ready(int s) const {
        const Stream& stream = network_.streams[s];
        const int k = head_[s];
        if (k == stream.count) return kNever;
        Time ready = 0;
        for (const Link& link : stream.before) {
            if (link.stream < 0) continue;
            if (head_[link.stream] <= k) return kNever;
            const Stream& other = network_.streams[link.stream];
            ready = std::max(ready, (*start_)[other.first + k] + other.duration + link.delay);
        }
        if (stream.acquires && policy_->window != kNever) {
            ready = std::max(ready, (*key_)[stream.first + k] - policy_->window);
        }
        return ready;
    }

    bool fits(int s) const {
        const Stream& stream = network_.streams[s];
        if (policy_->limit_depth && in_flight_[stream.slot] >= stream.depth) return false;
        const Memory cap = (*caps_)[stream.device];
        if (cap >= kNoLimit) return true;
        Memory needed = used_[stream.device] + stream.activation;
        if (needed > cap) return false;
        const int rank = policy_->rank[stream.pipeline];
        const Time key = (*key_)[stream.first + head_[s]];
        for (const int other : allocators_[stream.device]) {
            const Stream& rival = network_.streams[other];
            if (other == s || head_[other] == rival.count) continue;
            const bool owed = policy_->careful && in_flight_[rival.slot] == 0 &&
                              policy_->rank[rival.pipeline] <= rank;
            if (owed || (policy_->reserve_by_key && (*key_)[rival.first + head_[other]] < key)) {
                needed += rival.activation;
            }
        }
        return needed <= cap;
    }

    // What fits on a device changes only when it executes something.
    void refresh_fits(int device) {
        for (const int s : allocators_[device]) {
            fits_[s] = head_[s] < network_.streams[s].count && fits(s);
        }
    }

    Time earliest(int s, int device) const {
        if (ready_[s] == kNever) return kNever;
        if (!fits_[s]) return kNever;
        return std::max(ready_[s], free_[device]);
    }

    // Notes when the device must decide next: at the earliest start, or with patience at the
    // earliest end, before which nothing that is not known yet can become ready.
    void queue_up(int device) {
        Time due = kNever;
        for (const int s : network_.on_device[device]) {
            const Time start = earliest(s, device);
            if (start == kNever) continue;
            due =
                std::min(due, policy_->patience > 0 ? start + network_.streams[s].duration : start);
        }
        if (due == due_[device]) return;
        due_[device] = due;
        if (due == kNever) return;
        queue_.emplace_back(due, device);
        std::push_heap(queue_.begin(), queue_.end(), std::greater<>{});
    }

    int choose(int device, Time time) const {
        Time latest = time;
        if (policy_->patience > 0) {
            Time start = kNever;
            for (const int s : network_.on_device[device]) {
                const Time earliest_start = earliest(s, device);
                if (earliest_start != kNever &&
                    earliest_start + network_.streams[s].duration == time) {
                    start = std::min(start, earliest_start);
                }
            }
            const auto patience = static_cast<Time>(policy_->patience * double(time - start));
            latest = start + std::max<Time>(0, std::min(patience, time - start - 1));
        }
        int best = -1;
        Time best_key = 0;
        for (const int s : network_.on_device[device]) {
            if (earliest(s, device) > latest) continue;
            const Time key = (*key_)[network_.streams[s].first + head_[s]];
            if (best < 0 || key < best_key) {
                best = s;
                best_key = key;
            }
        }
        return best;
    }

    Time execute(int s) {
        const Stream& stream = network_.streams[s];
        const int device = stream.device;
        const Time start = std::max(ready_[s], free_[device]);
        (*start_)[stream.first + head_[s]] = start;
        ++head_[s];
        ready_[s] = find_ready(s);
        free_[device] = start + stream.duration;
        if (stream.acquires) {
            used_[device] += stream.activation;
            peak_ = std::max(peak_, used_[device]);
            ++in_flight_[stream.slot];
        }
        if (stream.releases) {
            used_[device] -= stream.activation;
            --in_flight_[stream.slot];
        }
        refresh_fits(device);
        return free_[device];
    }

    const Network& network_;
    const std::vector<Time>* key_ = nullptr;
    const std::vector<Memory>* caps_ = nullptr;
    const Policy* policy_ = nullptr;
    std::vector<Time>* start_ = nullptr;
    std::vector<int> head_;       // next subtask of each stream
    std::vector<Time> ready_;     // when it is ready
    std::vector<char> fits_;      // whether the head of each stream fits into the memory
    std::vector<int> in_flight_;  // micro-batches that hold memory, per slot
    std::vector<std::vector<int>> allocators_;  // such streams, per device
    std::vector<Time> free_;                    // end of the last subtask of each device
    std::vector<Memory> used_;
    Memory peak_ = 0;
    std::vector<Time> due_;  // the valid entry of each device in the queue
    std::vector<Due> queue_;
};

}  // namespace rlhfuse
