// The search of the RLHFuse paper (arXiv 2409.13221), kept as the reference that the guided search
// is measured against: two simulated annealings on the orders of the devices.
//
// A move swaps a random subtask with its neighbour on the device. The first annealing minimises the
// makespan, the second the peak activation memory at a makespan that never gets worse. The random
// number of the Metropolis rule is drawn before the move is evaluated: the worst value that it
// would still accept is then known, and a swap that must be worse is refused without being made.
//
// Invariants: no schedule ever exceeds the goal's limits unless the one at the start did; the best
// makespan never grows; planned by moves alone, the result depends on network, goal, start, seed
// and moves only, however the moves are cut into calls of `run`.
#pragma once

#include <chrono>
#include <cmath>
#include <memory>

#include "incremental.h"
#include "random.h"
#include "walker.h"

namespace rlhfuse {

class Annealing {
public:
    // `start`: the greedy schedule, or any other to improve upon.
    Annealing(Network network, Goal goal, const Schedule& start, std::uint64_t seed)
        : network_(std::move(network)),
          goal_(std::move(goal)),
          random_(seed),
          current_(std::make_unique<Incremental>(network_, start)),
          best_(current_->schedule()) {
        for (const Stream& stream : network_.streams) {
            work_ += double(stream.count) * double(stream.duration);
            if (stream.acquires) activation_ = std::max(activation_, double(stream.activation));
        }
        enter(false);
    }

    Annealing(const Annealing&) = delete;
    Annealing& operator=(const Annealing&) = delete;

    // What each annealing will get in all: the temperature falls over `moves`, whatever the clock
    // says, or over the seconds spent in `run` if `moves` is kUnplanned. Heats up (again). A
    // search that is not planned cools down within a second.
    void plan(double seconds, std::int64_t moves) {
        planned_seconds_ = seconds;
        planned_moves_ = moves;
        spent_seconds_ = 0.0;
        spent_moves_ = 0;
    }

    // Goes on for at most `seconds` or `moves`; `tighten`: the second annealing, else the first.
    // Stops early at the goal's makespan (first) or memory (second). Returns the moves done.
    std::int64_t run(double seconds, std::int64_t moves, bool tighten) {
        using Clock = std::chrono::steady_clock;
        if (tighten != tighten_) enter(tighten);
        const auto began = Clock::now();
        const double before = spent_seconds_;
        std::int64_t done = 0;
        for (; done < moves && !at_goal(); ++done) {
            if (done % kBlock == 0) {
                const double spent = std::chrono::duration<double>(Clock::now() - began).count();
                spent_seconds_ = before + spent;
                if (spent >= seconds) break;
            }
            if (spent_moves_ % kBlock == 0) temperature_ = cooled();
            if (tighten_) {
                move_memory();
            } else {
                move_makespan();
            }
            ++spent_moves_;
        }
        spent_seconds_ = before + std::chrono::duration<double>(Clock::now() - began).count();
        return done;
    }

    const Schedule& best() const { return best_; }
    std::int64_t accepted() const { return accepted_; }

    static constexpr std::int64_t kUnplanned = std::numeric_limits<std::int64_t>::max();

private:
    static constexpr std::int64_t kBlock = 256;  // moves between two looks at clock and temperature
    // Temperatures, hot and cold. Of the first annealing in mean durations of a subtask; of the
    // second in activations of a micro-batch. Tuned on the published instances in a few seconds
    // each: a makespan is lost to one swap and found again by few, so the first stays cold.
    static constexpr double kHotTime = 0.05;
    static constexpr double kColdTime = 0.02;
    static constexpr double kHotMemory = 0.3;
    static constexpr double kColdMemory = 0.03;

    bool at_goal() const {
        return tighten_ ? best_.peak <= goal_.memory : best_.makespan <= goal_.makespan;
    }

    // Both annealings begin at the best schedule so far.
    void enter(bool tighten) {
        tighten_ = tighten;
        current_ = std::make_unique<Incremental>(network_, best_);
        set_cap();
        plan(planned_seconds_, planned_moves_);
    }

    // Geometric cooling: from 1 to 0 in the share of the plan that is spent.
    double cooled() const {
        const double spent = planned_moves_ != kUnplanned
                                 ? double(spent_moves_) / double(planned_moves_)
                                 : spent_seconds_ / planned_seconds_;
        const double hot = tighten_ ? kHotMemory * activation_ : kHotTime * mean_duration();
        const double cold = tighten_ ? kColdMemory * activation_ : kColdTime * mean_duration();
        return hot * std::pow(cold / hot, std::min(1.0, spent));
    }

    double mean_duration() const { return work_ / double(network_.subtasks); }

    // How much worse the Metropolis rule lets the next move be: exp(-allowed / temperature) is
    // uniform in (0, 1].
    double draw_allowance() { return -temperature_ * std::log(1.0 - random_.unit()); }

    void move_makespan() {
        const int u = random_.below(network_.subtasks);
        const double allowed = draw_allowance();
        if (!current_->may_swap(u) || !within_limits(u)) return;
        const Time limit = current_->makespan() + static_cast<Time>(allowed);
        if (!current_->try_swap(u, limit)) return;
        ++accepted_;
        if (current_->makespan() < best_.makespan) best_ = current_->schedule();
    }

    // The peak is the same for nearly all neighbours of a schedule. What is minimised is how far
    // all subtasks together exceed a memory just below the best peak: it says how much is left to
    // do, and the peak is lowered when it comes to nothing.
    void move_memory() {
        const int u = random_.below(network_.subtasks);
        const double allowed = draw_allowance();
        if (!current_->may_swap(u) || !within_limits(u)) return;
        const auto [level_v, level_u] = current_->swapped_levels(u);
        const int v = current_->next(u);
        const Memory change = excess(level_v) + excess(level_u) - excess(current_->level(u)) -
                              excess(current_->level(v));
        if (double(change) > allowed || !current_->try_swap(u, best_.makespan)) return;
        ++accepted_;
        excess_ += change;
        if (excess_ > 0 && current_->makespan() == best_.makespan) return;
        const Schedule schedule = current_->schedule();
        if (Walker::better(schedule, best_)) best_ = schedule;
        set_cap();
    }

    bool within_limits(int u) const {
        const Memory limit = goal_.limits[current_->device(u)];
        const auto [level_v, level_u] = current_->swapped_levels(u);
        return level_v <= limit && level_u <= limit;
    }

    Memory excess(Memory level) const { return std::max<Memory>(0, level - cap_); }

    void set_cap() {
        cap_ = best_.peak - 1;
        excess_ = 0;
        for (int o = 0; o < network_.subtasks; ++o) excess_ += excess(current_->level(o));
    }

    const Network network_;
    const Goal goal_;
    Random random_;
    std::unique_ptr<Incremental> current_;
    Schedule best_;
    double work_ = 0.0;
    double activation_ = 0.0;  // the largest of a micro-batch
    bool tighten_ = false;
    Memory cap_ = 0;     // of the second annealing, see move_memory
    Memory excess_ = 0;  // of all subtasks together
    double planned_seconds_ = 1.0;
    std::int64_t planned_moves_ = kUnplanned;
    double spent_seconds_ = 0.0;  // since `plan`
    std::int64_t spent_moves_ = 0;
    double temperature_ = 0.0;
    std::int64_t accepted_ = 0;
};

}  // namespace rlhfuse
