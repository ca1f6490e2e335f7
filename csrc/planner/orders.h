// A schedule as one linked order of subtasks per device, evaluated from scratch.
//
// The links of the network and the orders of the devices make a graph. A subtask's head is the
// longest path to its start, so its earliest start; its tail is the longest path from its end to
// the end of all. Tails are heads backwards in time: what computes the one computes the other, and
// only takes the other side.
//
// Invariants: every subtask comes once, on its own device; every stream is in micro-batch order;
// the graph has no cycle; heads, tails, levels and makespan are those of the orders.
#pragma once

#include <stdexcept>
#include <string>

#include "network.h"

namespace rlhfuse {

enum Side { kBefore = 0, kAfter = 1 };

constexpr Side opposite(Side side) { return side == kBefore ? kAfter : kBefore; }

class Orders {
public:
    // The orders of a schedule's starts. Throws std::invalid_argument where they are no schedule.
    Orders(const Network& network, const Schedule& schedule) : network_(network) {
        if (static_cast<int>(schedule.start.size()) != network.subtasks) {
            throw std::invalid_argument(
                "schedule: it has " + std::to_string(schedule.start.size()) +
                " subtasks, the network " + std::to_string(network.subtasks));
        }
        make_nodes();
        set_orders(sorted(schedule.start));
    }

    // The subtasks of each device in order, [devices][subtasks on the device].
    Orders(const Network& network, const std::vector<std::vector<int>>& orders)
        : network_(network) {
        make_nodes();
        set_orders(orders);
    }

    Orders(const Orders&) = delete;
    Orders& operator=(const Orders&) = delete;

    Time makespan() const { return makespan_; }
    Time start(int subtask) const { return nodes_[subtask].path[kBefore]; }
    Time tail(int subtask) const { return nodes_[subtask].path[kAfter]; }

    // The neighbour behind it on its device; -1 for the last one.
    int next(int subtask) const { return nodes_[subtask].neighbour[kAfter]; }
    int device(int subtask) const { return nodes_[subtask].device; }

    // Activation memory of the subtask's device while it runs.
    Memory level(int subtask) const { return nodes_[subtask].level; }

    // Highest activation memory of any device; looks at all subtasks.
    Memory peak() const {
        Memory peak = 0;
        for (const Node& node : nodes_) peak = std::max(peak, node.level);
        return peak;
    }

    // The subtasks of each device in order, [devices][subtasks on the device].
    std::vector<std::vector<int>> orders() const {
        std::vector<std::vector<int>> orders(network_.devices);
        for (int device = 0; device < network_.devices; ++device) {
            std::vector<int>& order = orders[device];
            for (int o = last_[device]; o >= 0; o = nodes_[o].neighbour[kBefore]) {
                order.push_back(o);
            }
            std::reverse(order.begin(), order.end());
        }
        return orders;
    }

    Schedule schedule() const {
        Schedule schedule;
        schedule.start.reserve(nodes_.size());
        for (const Node& node : nodes_) schedule.start.push_back(node.path[kBefore]);
        schedule.makespan = makespan();
        schedule.peak = peak();
        return schedule;
    }

    // Computes the starts of all subtasks from the orders, the straightforward way. Returns the
    // makespan, or kNever if the orders run into a deadlock.
    Time full_evaluation(std::vector<Time>& start) { return evaluate(kBefore, start); }

protected:
    // All that a visit reads, in one cache line. Pairs are indexed by side.
    struct alignas(64) Node {
        Time duration = 0;
        std::array<Time, 2> path{};  // head and tail
        Memory level = 0;
        std::array<int, 2> neighbour{-1, -1};  // on the device, -1 where there is none
        std::array<std::array<int, 2>, 2> linked{{{-1, -1}, {-1, -1}}};  // of the same micro-batch
        int stream = 0;
        int device = 0;
    };

    const Stream& stream_of(int o) const { return network_.streams[nodes_[o].stream]; }

    const std::array<Link, 2>& links(int o, Side side) const {
        return side == kBefore ? stream_of(o).before : stream_of(o).after;
    }

    // Longest path that comes from that side and has subtask `o` as its last; 0 if there is none.
    Time path_from(Side side, int o) const {
        return o < 0 ? 0 : nodes_[o].path[side] + nodes_[o].duration;
    }

    // Longest path to subtask `o` over the links of its micro-batch, its device left aside.
    Time linked_path(Side side, int o) const {
        const auto& links = this->links(o, side);
        Time longest = 0;
        for (int i = 0; i < 2; ++i) {
            const int p = nodes_[o].linked[side][i];
            if (p >= 0) longest = std::max(longest, path_from(side, p) + links[i].delay);
        }
        return longest;
    }

    Time latest_end() const {
        Time latest = 0;
        for (const int o : last_) latest = std::max(latest, path_from(kBefore, o));
        return latest;
    }

    const Network& network_;
    std::vector<Node> nodes_;
    std::vector<int> last_;  // per device, -1 if it has no subtasks
    Time makespan_ = 0;

private:
    void make_nodes() {
        nodes_.resize(network_.subtasks);
        for (int s = 0; s < static_cast<int>(network_.streams.size()); ++s) {
            const Stream& stream = network_.streams[s];
            if (stream.duration <= 0) {
                throw std::invalid_argument("stream " + std::to_string(s) +
                                            ": its duration must be positive");
            }
            for (int k = 0; k < stream.count; ++k) {
                Node& node = nodes_[stream.first + k];
                node.duration = stream.duration;
                node.stream = s;
                node.device = stream.device;
                for (int i = 0; i < 2; ++i) {
                    node.linked[kBefore][i] = linked(stream.before[i], k);
                    node.linked[kAfter][i] = linked(stream.after[i], k);
                }
            }
        }
    }

    int linked(const Link& link, int k) const {
        return link.stream < 0 ? -1 : network_.streams[link.stream].first + k;
    }

    std::vector<std::vector<int>> sorted(const std::vector<Time>& start) const {
        std::vector<std::vector<int>> orders(network_.devices);
        for (int o = 0; o < network_.subtasks; ++o) orders[nodes_[o].device].push_back(o);
        for (std::vector<int>& order : orders) {
            std::stable_sort(order.begin(), order.end(),
                             [&](int one, int other) { return start[one] < start[other]; });
        }
        return orders;
    }

    void set_orders(const std::vector<std::vector<int>>& orders) {
        check(orders);
        last_.assign(network_.devices, -1);
        for (int device = 0; device < network_.devices; ++device) link_up(device, orders[device]);
        std::vector<Time> path;
        for (const Side side : {kBefore, kAfter}) {
            makespan_ = evaluate(side, path);
            if (makespan_ == kNever) {
                throw std::invalid_argument("orders: they run into a deadlock");
            }
            for (int o = 0; o < network_.subtasks; ++o) nodes_[o].path[side] = path[o];
        }
    }

    // Every subtask once, on its own device, every stream in micro-batch order.
    void check(const std::vector<std::vector<int>>& orders) const {
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
        for (const int o : order) {
            const Stream& stream = stream_of(o);
            if (stream.acquires) used += stream.activation;
            nodes_[o].level = used;
            if (stream.releases) used -= stream.activation;
            nodes_[o].neighbour = {last_[device], -1};
            if (last_[device] >= 0) nodes_[last_[device]].neighbour[kAfter] = o;
            last_[device] = o;
        }
    }

    // Longest paths of one side, [subtasks], in topological order. Returns the longest of all, or
    // kNever if there is a cycle.
    Time evaluate(Side side, std::vector<Time>& path) {
        const Side onward = opposite(side);
        path.assign(nodes_.size(), 0);
        waits_.assign(nodes_.size(), 0);
        ready_.clear();
        for (int o = 0; o < network_.subtasks; ++o) {
            const Node& node = nodes_[o];
            const auto& linked = node.linked[side];
            waits_[o] = (node.neighbour[side] >= 0) + (linked[0] >= 0) + (linked[1] >= 0);
            if (waits_[o] == 0) ready_.push_back(o);
        }
        Time longest = 0;
        std::size_t done = 0;
        for (; done < ready_.size(); ++done) {
            const int o = ready_[done];
            const Node& node = nodes_[o];
            const Time end = path[o] + node.duration;
            longest = std::max(longest, end);
            const auto& links = this->links(o, onward);
            release(node.neighbour[onward], end, path);
            release(node.linked[onward][0], end + links[0].delay, path);
            release(node.linked[onward][1], end + links[1].delay, path);
        }
        return done == nodes_.size() ? longest : kNever;
    }

    void release(int o, Time ready, std::vector<Time>& path) {
        if (o < 0) return;
        path[o] = std::max(path[o], ready);
        if (--waits_[o] == 0) ready_.push_back(o);
    }

    std::vector<int> waits_;  // of evaluate
    std::vector<int> ready_;
};

}  // namespace rlhfuse
