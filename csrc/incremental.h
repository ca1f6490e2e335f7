// A schedule as one linked order of subtasks per device, re-evaluated swap by swap.
//
// Starts are the earliest ones that the orders allow. Swapping two neighbours on a device changes
// the starts of some subtasks behind them only, and `try_swap` visits no others. It visits them by
// their starts before the swap. Durations are positive, so that order puts every subtask behind all
// it waits for, the two swapped ones apart, which are done first: each start is final when it is
// computed, and a swap that must exceed the limit is given up at the first subtask that proves it.
//
// A swap of u with its successor v closes a cycle if and only if another path leads from u to v.
// All on that path started before v could, and after the swap they must start after v ends: they
// all move, so the pass arrives at v again if and only if there is a cycle, before it has visited
// anything that started after v.
//
// In a tight schedule a swap may still move a good part of what comes after it: what pays is the
// limit. The closer it is to the current makespan, the fewer subtasks are visited.
//
// Invariants: starts, levels and makespan are those of the current orders (`full_evaluation`
// computes them anew); a swap that is refused leaves no trace; every stream is in micro-batch
// order.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "network.h"

namespace rlhfuse {

class Incremental {
public:
    // The orders of a schedule's starts. Throws std::invalid_argument where they are no schedule.
    Incremental(const Network& network, const Schedule& schedule) : network_(network) {
        make_nodes();
        if (static_cast<int>(schedule.start.size()) != network.subtasks) {
            throw std::invalid_argument(
                "schedule: it has " + std::to_string(schedule.start.size()) +
                " subtasks, the network " + std::to_string(network.subtasks));
        }
        set_orders(sorted_orders(schedule.start));
    }

    // The subtasks of each device in order, [devices][subtasks on the device].
    Incremental(const Network& network, const std::vector<std::vector<int>>& orders)
        : network_(network) {
        make_nodes();
        set_orders(orders);
    }

    Incremental(const Incremental&) = delete;
    Incremental& operator=(const Incremental&) = delete;

    Time makespan() const { return latest_[1]; }
    Time start(int subtask) const { return nodes_[subtask].start; }

    // The neighbour behind it on its device; -1 for the last one.
    int next(int subtask) const { return nodes_[subtask].next; }
    int device(int subtask) const { return nodes_[subtask].device; }

    // Activation memory of the subtask's device while it runs.
    Memory level(int subtask) const { return nodes_[subtask].level; }

    // Highest activation memory of any device; looks at all subtasks.
    Memory peak() const {
        Memory peak = 0;
        for (const Node& node : nodes_) peak = std::max(peak, node.level);
        return peak;
    }

    // Subtasks to which swaps have given a new start; refused swaps count, undoing does not.
    std::int64_t touched() const { return touched_; }

    // Levels after a swap of `u` with its neighbour: first the neighbour's, then its own.
    std::pair<Memory, Memory> swapped_levels(int u) const {
        const Stream& one = stream_of(u);
        const Stream& other = stream_of(nodes_[u].next);
        const Memory before = nodes_[u].level - (one.acquires ? one.activation : 0);
        const Memory first = before + (other.acquires ? other.activation : 0);
        const Memory between = first - (other.releases ? other.activation : 0);
        return {first, between + (one.acquires ? one.activation : 0)};
    }

    // False if a swap of `u` with its neighbour is pointless or obviously impossible: there is no
    // neighbour, it is of the same stream (identical micro-batches), or it waits for `u` directly
    // or through one other subtask.
    bool may_swap(int u) const {
        const int v = nodes_[u].next;
        if (v < 0 || nodes_[v].stream == nodes_[u].stream) return false;
        for (const int after : nodes_[u].after) {
            if (after < 0) continue;
            if (after == v || after == nodes_[v].before[0] || after == nodes_[v].before[1]) {
                return false;
            }
        }
        return true;
    }

    // Swaps `u` with its neighbour if that leaves a schedule of makespan <= `limit`, which must not
    // be below the current makespan unless a gain is asked for. Returns whether it did.
    bool try_swap(int u, Time limit) {
        swapped_ = -1;
        if (!may_swap(u)) return false;
        changes_.clear();
        swapped_ = nodes_[u].next;
        exchange(u, swapped_);
        if (propagate(u, limit) && makespan() <= limit) return true;
        undo();
        return false;
    }

    // Takes back the swap that the last `try_swap` applied; at most once.
    void undo() {
        if (swapped_ < 0) throw std::logic_error("undo: there is no swap to take back");
        for (const auto& [subtask, start] : changes_) nodes_[subtask].start = start;
        exchange(swapped_, nodes_[swapped_].next);
        for (const auto& [subtask, start] : changes_) note_end(subtask);
        swapped_ = -1;
    }

    // Computes the starts of all subtasks from the orders, the straightforward way. Returns the
    // makespan, or kNever if the orders run into a deadlock.
    Time full_evaluation(std::vector<Time>& start) {
        start.assign(nodes_.size(), 0);
        waits_.assign(nodes_.size(), 0);
        ready_.clear();
        for (int o = 0; o < network_.subtasks; ++o) {
            const Node& node = nodes_[o];
            waits_[o] = (node.previous >= 0) + (node.before[0] >= 0) + (node.before[1] >= 0);
            if (waits_[o] == 0) ready_.push_back(o);
        }
        Time makespan = 0;
        std::size_t done = 0;
        for (; done < ready_.size(); ++done) {
            const Node& node = nodes_[ready_[done]];
            const Time end = start[ready_[done]] + node.duration;
            makespan = std::max(makespan, end);
            const auto& after = network_.streams[node.stream].after;
            release(node.next, end, start);
            release(node.after[0], end + after[0].delay, start);
            release(node.after[1], end + after[1].delay, start);
        }
        return done == nodes_.size() ? makespan : kNever;
    }

    // The subtasks of each device in order, [devices][subtasks on the device].
    std::vector<std::vector<int>> orders() const {
        std::vector<std::vector<int>> orders(network_.devices);
        for (int device = 0; device < network_.devices; ++device) {
            for (int o = last_[device]; o >= 0; o = nodes_[o].previous) orders[device].push_back(o);
            std::reverse(orders[device].begin(), orders[device].end());
        }
        return orders;
    }

    Schedule schedule() const {
        Schedule schedule;
        schedule.start.reserve(nodes_.size());
        for (const Node& node : nodes_) schedule.start.push_back(node.start);
        schedule.makespan = makespan();
        schedule.peak = peak();
        return schedule;
    }

private:
    // All that a visit reads, in one cache line.
    struct alignas(64) Node {
        Time start = 0;
        Time duration = 0;
        Time tail = 0;  // no schedule of these orders ends before start + tail
        Memory level = 0;
        int previous = -1;  // neighbours on the device
        int next = -1;
        std::array<int, 2> before{-1, -1};  // of the same micro-batch, -1 where there is none
        std::array<int, 2> after{-1, -1};
        int stream = 0;
        int device = 0;
    };

    const Stream& stream_of(int o) const { return network_.streams[nodes_[o].stream]; }

    void make_nodes() {
        nodes_.resize(network_.subtasks);
        path_.resize(network_.subtasks);
        rest_.resize(network_.subtasks);
        queued_.assign(network_.subtasks, 0);
        way_out_.assign(network_.devices, kNever);
        const std::vector<Time> tails = network_.tails();
        for (int s = 0; s < static_cast<int>(network_.streams.size()); ++s) {
            const Stream& stream = network_.streams[s];
            if (stream.duration <= 0) {
                throw std::invalid_argument("stream " + std::to_string(s) +
                                            ": its duration must be positive");
            }
            way_out_[stream.device] = std::min(way_out_[stream.device], tails[s] - stream.duration);
            for (int k = 0; k < stream.count; ++k) {
                Node& node = nodes_[stream.first + k];
                node.duration = stream.duration;
                node.stream = s;
                node.device = stream.device;
                for (int i = 0; i < 2; ++i) {
                    node.before[i] = linked(stream.before[i], k);
                    node.after[i] = linked(stream.after[i], k);
                }
            }
        }
        find_paths(tails);
        leaves_ = 1;
        while (leaves_ < network_.devices) leaves_ *= 2;
    }

    int linked(const Link& link, int k) const {
        return link.stream < 0 ? -1 : network_.streams[link.stream].first + k;
    }

    // Longest way from the start of a subtask to the end of its pipeline, whatever the orders: on
    // with its micro-batch, or on with its stream, which is in micro-batch order.
    void find_paths(const std::vector<Time>& tails) {
        std::vector<int> by_tail(network_.streams.size());
        std::iota(by_tail.begin(), by_tail.end(), 0);
        std::sort(by_tail.begin(), by_tail.end(),
                  [&](int one, int other) { return tails[one] < tails[other]; });
        for (const int s : by_tail) {
            const Stream& stream = network_.streams[s];
            for (int k = stream.count - 1; k >= 0; --k) {
                Time longest = k + 1 < stream.count ? path_[stream.first + k + 1] : 0;
                for (const Link& link : stream.after) {
                    if (link.stream < 0) continue;
                    longest = std::max(longest, link.delay + path_[linked(link, k)]);
                }
                path_[stream.first + k] = stream.duration + longest;
            }
        }
    }

    std::vector<std::vector<int>> sorted_orders(const std::vector<Time>& start) const {
        std::vector<std::vector<int>> orders(network_.devices);
        for (int o = 0; o < network_.subtasks; ++o) orders[nodes_[o].device].push_back(o);
        for (std::vector<int>& order : orders) {
            std::stable_sort(order.begin(), order.end(),
                             [&](int one, int other) { return start[one] < start[other]; });
        }
        return orders;
    }

    void set_orders(const std::vector<std::vector<int>>& orders) {
        check_orders(orders);
        last_.assign(network_.devices, -1);
        latest_.assign(2 * leaves_, 0);
        for (int device = 0; device < network_.devices; ++device) link_up(device, orders[device]);
        std::vector<Time> start;
        if (full_evaluation(start) == kNever) {
            throw std::invalid_argument("orders: they run into a deadlock");
        }
        for (int o = 0; o < network_.subtasks; ++o) nodes_[o].start = start[o];
        for (const int o : last_) note_end(o);
    }

    // Every subtask once, on its own device, every stream in micro-batch order.
    void check_orders(const std::vector<std::vector<int>>& orders) const {
        if (static_cast<int>(orders.size()) != network_.devices) {
            throw std::invalid_argument("orders: one is needed for each of the " +
                                        std::to_string(network_.devices) + " devices");
        }
        std::vector<int> head(network_.streams.size(), 0);
        std::size_t total = 0;
        for (int device = 0; device < network_.devices; ++device) {
            for (const int o : orders[device]) {
                const bool known = o >= 0 && o < network_.subtasks && nodes_[o].device == device;
                if (!known || stream_of(o).first + head[nodes_[o].stream]++ != o) {
                    throw std::invalid_argument("orders: device " + std::to_string(device) +
                                                ": subtask " + std::to_string(o) +
                                                " is repeated, out of order or elsewhere");
                }
                ++total;
            }
        }
        if (total != nodes_.size()) throw std::invalid_argument("orders: subtasks are missing");
    }

    void link_up(int device, const std::vector<int>& order) {
        Memory used = 0;
        for (std::size_t i = 0; i < order.size(); ++i) {
            Node& node = nodes_[order[i]];
            const Stream& stream = network_.streams[node.stream];
            node.previous = i > 0 ? order[i - 1] : -1;
            node.next = i + 1 < order.size() ? order[i + 1] : -1;
            if (stream.acquires) used += stream.activation;
            node.level = used;
            if (stream.releases) used -= stream.activation;
        }
        Time rest = 0;
        for (auto o = order.rbegin(); o != order.rend(); ++o) {
            rest += nodes_[*o].duration;
            set_rest(*o, rest);
        }
        if (!order.empty()) last_[device] = order.back();
    }

    // `rest`: the work of the device from the start of the subtask on. Whatever comes last on the
    // device, its micro-batch still has a way to go after that.
    void set_rest(int o, Time rest) {
        rest_[o] = rest;
        nodes_[o].tail = std::max(path_[o], rest + way_out_[nodes_[o].device]);
    }

    // Puts v, the neighbour behind u, before it. Starts are left as they are.
    void exchange(int u, int v) {
        const auto [level_v, level_u] = swapped_levels(u);
        Node& one = nodes_[u];
        Node& other = nodes_[v];
        const int ahead = one.previous;
        const int behind = other.next;
        other.previous = ahead;
        other.next = u;
        one.previous = v;
        one.next = behind;
        if (ahead >= 0) nodes_[ahead].next = v;
        if (behind >= 0) nodes_[behind].previous = u;
        if (behind < 0) last_[one.device] = u;
        other.level = level_v;
        one.level = level_u;
        const Time rest = rest_[u];
        set_rest(v, rest);
        set_rest(u, rest - other.duration);
    }

    // Updates all starts after v = `swapped_` has been put before u. False if some subtask's start
    // shows that the makespan exceeds the limit, or if the swap has closed a cycle.
    bool propagate(int u, Time limit) {
        cyclic_ = false;
        bool within = move(swapped_, earliest(swapped_), limit) && move(u, earliest(u), limit);
        if (within) {
            queue_successors(swapped_);
            queue_successors(u);
        }
        while (within && !cyclic_ && !queue_.empty()) {
            const int o = pop();
            const Time start = earliest(o);
            if (start == nodes_[o].start) continue;
            within = move(o, start, limit);
            if (within) queue_successors(o);
        }
        for (const auto& entry : queue_) queued_[entry.second] = 0;
        queue_.clear();
        return within && !cyclic_;
    }

    Time earliest(int o) const {
        const Node& node = nodes_[o];
        Time earliest = node.previous < 0 ? 0 : end(node.previous);
        for (int i = 0; i < 2; ++i) {
            if (node.before[i] < 0) continue;
            const Time delay = network_.streams[node.stream].before[i].delay;
            earliest = std::max(earliest, end(node.before[i]) + delay);
        }
        return earliest;
    }

    Time end(int o) const { return nodes_[o].start + nodes_[o].duration; }

    // Gives a subtask its new start, which is final. False if it is too late.
    bool move(int o, Time start, Time limit) {
        Node& node = nodes_[o];
        changes_.emplace_back(o, node.start);
        ++touched_;
        node.start = start;
        if (node.next < 0) note_end(o);
        return start + node.tail <= limit;
    }

    void queue_successors(int o) {
        queue_up(nodes_[o].next);
        queue_up(nodes_[o].after[0]);
        queue_up(nodes_[o].after[1]);
    }

    void queue_up(int o) {
        if (o < 0) return;
        if (o == swapped_) {
            cyclic_ = true;
            return;
        }
        // If another of its predecessors still moves, that one will ask again.
        if (queued_[o] || earliest(o) == nodes_[o].start) return;
        queued_[o] = 1;
        queue_.emplace_back(nodes_[o].start, o);
        std::push_heap(queue_.begin(), queue_.end(), later);
    }

    int pop() {
        std::pop_heap(queue_.begin(), queue_.end(), later);
        const int o = queue_.back().second;
        queue_.pop_back();
        queued_[o] = 0;
        return o;
    }

    static bool later(const std::pair<Time, int>& one, const std::pair<Time, int>& other) {
        return one.first > other.first;
    }

    // Keeps the latest end of all devices as the root of a tournament of the last subtasks.
    void note_end(int o) {
        if (o < 0 || nodes_[o].next >= 0) return;
        int place = leaves_ + nodes_[o].device;
        Time latest = end(o);
        while (latest_[place] != latest) {
            latest_[place] = latest;
            if (place == 1) return;
            latest = std::max(latest, latest_[place ^ 1]);
            place /= 2;
        }
    }

    void release(int o, Time ready, std::vector<Time>& start) {
        if (o < 0) return;
        start[o] = std::max(start[o], ready);
        if (--waits_[o] == 0) ready_.push_back(o);
    }

    const Network& network_;
    std::vector<Node> nodes_;
    std::vector<Time> path_;     // per subtask, see find_paths
    std::vector<Time> rest_;     // per subtask, see set_rest
    std::vector<Time> way_out_;  // per device, the shortest way on after the end of a subtask
    std::vector<int> last_;      // per device, -1 if it has no subtasks
    int leaves_ = 1;
    std::vector<Time> latest_;  // a heap of 2 * leaves_: place 1 is the root, see note_end
    int swapped_ = -1;          // the subtask that the last swap put forward, -1 after undoing
    bool cyclic_ = false;
    std::vector<std::pair<int, Time>> changes_;  // subtasks moved by the last swap, starts before
    std::vector<std::pair<Time, int>> queue_;    // subtasks to visit, by starts before the swap
    std::vector<char> queued_;
    std::int64_t touched_ = 0;
    std::vector<int> waits_;  // of full_evaluation
    std::vector<int> ready_;
};

}  // namespace rlhfuse
