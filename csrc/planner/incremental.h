// Orders of subtasks, re-evaluated swap by swap.
//
// With exact heads and tails, the longest path through two neighbours after their swap follows from
// their surroundings alone, and all other paths are there already before it (job-shop scheduling;
// Taillard 1994, Balas and Vazacopoulos 1998). If the limit is no less than the makespan, a swap
// that would exceed it is thus refused at once, exactly, whatever the size of the problem. Only
// swaps that are made cost more: they change heads behind them and tails before them, and
// `propagate` follows the changes only.
//
// It visits subtasks by their paths before the swap. Durations are positive, so that order puts
// every subtask behind all that its path depends on, the one put forward apart, which is therefore
// done first: each path is final when it is computed.
//
// A swap of u with its successor v closes a cycle if and only if another path leads from u to v.
// All on that path started before v could, and after the swap they must start after v ends: they
// all move, so the pass over the heads arrives at v again if and only if there is a cycle, before
// it has visited anything that started after v.
//
// Invariants: as for Orders, after every swap; a swap that is refused leaves no trace.
#pragma once

#include <functional>
#include <utility>

#include "orders.h"

namespace rlhfuse {

class Incremental : public Orders {
public:
    using Orders::Orders;

    // Heads and tails that swaps have recomputed. Undoing recomputes none.
    std::int64_t touched() const { return touched_; }

    // Levels after a swap of `u` with its neighbour: first the neighbour's, then its own.
    std::pair<Memory, Memory> swapped_levels(int u) const {
        const Stream& one = stream_of(u);
        const Stream& other = stream_of(next(u));
        const Memory before = level(u) - (one.acquires ? one.activation : 0);
        const Memory first = before + (other.acquires ? other.activation : 0);
        const Memory between = first - (other.releases ? other.activation : 0);
        return {first, between + (one.acquires ? one.activation : 0)};
    }

    // False if a swap of `u` with its neighbour is pointless or obviously impossible: there is no
    // neighbour, it is of the same stream (identical micro-batches), or it waits for `u` directly
    // or through one other subtask.
    bool may_swap(int u) const {
        const int v = next(u);
        if (v < 0 || nodes_[v].stream == nodes_[u].stream) return false;
        const auto& before = nodes_[v].linked[kBefore];
        for (const int after : nodes_[u].linked[kAfter]) {
            if (after < 0) continue;
            if (after == v || after == before[0] || after == before[1]) return false;
        }
        return true;
    }

    // Swaps `u` with its neighbour if that leaves a schedule of makespan <= `limit`. Returns
    // whether it did. A limit below the makespan asks for a gain, which takes a pass to find out.
    bool try_swap(int u, Time limit) {
        swapped_ = -1;
        if (!may_swap(u) || path_through_swapped(u) > limit) return false;
        swapped_ = next(u);
        makespan_before_ = makespan_;
        for (auto& changes : changes_) changes.clear();
        exchange(u, swapped_);
        if (propagate(kBefore, swapped_, u)) {
            makespan_ = latest_end();
            if (makespan_ <= limit) {
                propagate(kAfter, u, swapped_);
                return true;
            }
        }
        undo();
        return false;
    }

    // Takes back the swap that the last `try_swap` applied; at most once.
    void undo() {
        if (swapped_ < 0) throw std::logic_error("undo: there is no swap to take back");
        for (const Side side : {kBefore, kAfter}) {
            for (const auto& [subtask, path] : changes_[side]) nodes_[subtask].path[side] = path;
        }
        exchange(swapped_, next(swapped_));
        makespan_ = makespan_before_;
        swapped_ = -1;
    }

private:
    // Longest path through u or its neighbour v after their swap; exact unless that closes a cycle,
    // and then it does not matter, for the swap is refused in any case.
    Time path_through_swapped(int u) const {
        const Node& one = nodes_[u];
        const int v = one.neighbour[kAfter];
        const Node& other = nodes_[v];
        const Time head_v =
            std::max(path_from(kBefore, one.neighbour[kBefore]), linked_path(kBefore, v));
        const Time head_u = std::max(head_v + other.duration, linked_path(kBefore, u));
        const Time tail_u =
            std::max(path_from(kAfter, other.neighbour[kAfter]), linked_path(kAfter, u));
        const Time tail_v = std::max(tail_u + one.duration, linked_path(kAfter, v));
        return std::max(head_v + other.duration + tail_v, head_u + one.duration + tail_u);
    }

    // Puts v, the neighbour behind u, before it. Heads and tails are left as they are.
    void exchange(int u, int v) {
        const auto [level_v, level_u] = swapped_levels(u);
        Node& one = nodes_[u];
        Node& other = nodes_[v];
        const int ahead = one.neighbour[kBefore];
        const int behind = other.neighbour[kAfter];
        other.neighbour = {ahead, u};
        one.neighbour = {v, behind};
        if (ahead >= 0) nodes_[ahead].neighbour[kAfter] = v;
        if (behind >= 0) nodes_[behind].neighbour[kBefore] = u;
        if (behind < 0) last_[one.device] = u;
        other.level = level_v;
        one.level = level_u;
    }

    // Updates the paths of one side after `first` has been put before `second` as seen from there.
    // False if the swap has closed a cycle; the paths are then of no use.
    bool propagate(Side side, int first, int second) {
        first_ = first;
        cyclic_ = false;
        update(side, first);
        // The one passed and the one behind both have a new neighbour, whether or not paths change.
        queue_up(side, second);
        const int behind = nodes_[second].neighbour[opposite(side)];
        if (behind >= 0) queue_up(side, behind);
        while (!cyclic_ && !queue_.empty()) update(side, pop());
        for (const auto& entry : queue_) queued_[entry.second] = 0;
        queue_.clear();
        return !cyclic_;
    }

    // Recomputes the path to `o`. If it has changed, queues those whose paths may change with it.
    void update(Side side, int o) {
        Node& node = nodes_[o];
        const Time before = node.path[side];
        const Time after = std::max(path_from(side, node.neighbour[side]), linked_path(side, o));
        ++touched_;
        if (after == before) return;
        changes_[side].emplace_back(o, before);
        node.path[side] = after;
        const Side onward = opposite(side);
        const auto& links = this->links(o, onward);
        reconsider(side, node.neighbour[onward], before + node.duration, after + node.duration);
        for (int i = 0; i < 2; ++i) {
            const Time length = node.duration + links[i].delay;
            reconsider(side, node.linked[onward][i], before + length, after + length);
        }
    }

    // One of the ways to `o` has changed from `before` to `after`: does its longest path change?
    // Perhaps, if this way is now longer than that, or was as long.
    void reconsider(Side side, int o, Time before, Time after) {
        if (o < 0) return;
        if (o == first_) {
            cyclic_ = true;
        } else if (after > nodes_[o].path[side] || before == nodes_[o].path[side]) {
            queue_up(side, o);
        }
    }

    void queue_up(Side side, int o) {
        if (queued_[o]) return;
        queued_[o] = 1;
        queue_.emplace_back(nodes_[o].path[side], o);
        std::push_heap(queue_.begin(), queue_.end(), std::greater<>{});
    }

    int pop() {
        std::pop_heap(queue_.begin(), queue_.end(), std::greater<>{});
        const int o = queue_.back().second;
        queue_.pop_back();
        queued_[o] = 0;
        return o;
    }

    int swapped_ = -1;  // the subtask that the last swap put forward, -1 after undoing
    Time makespan_before_ = 0;
    std::array<std::vector<std::pair<int, Time>>, 2> changes_;  // by the last swap: paths before
    int first_ = -1;  // of the pass, which has run into a cycle if it arrives there again
    bool cyclic_ = false;
    std::vector<std::pair<Time, int>> queue_;  // subtasks to visit, by paths before the swap
    std::vector<char> queued_ = std::vector<char>(nodes_.size(), 0);
    std::int64_t touched_ = 0;
};

}  // namespace rlhfuse
