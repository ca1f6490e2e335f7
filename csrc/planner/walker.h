// One walk of the guided search: forward-backward improvement of list schedules under a memory cap.
//
// A schedule's end times, read backwards, are keys for list scheduling the reversed network, and
// the other way round: one turn of the two never loses much and often gains (forward-backward
// improvement; Li and Willis 1992, Tormos and Lova 2001). The walk perturbs the keys in a random
// stretch of time on some devices, turns, and keeps what is not worse. The cap on the memory of all
// devices is lowered whenever the goal for the makespan is met under it, so makespan and memory are
// one search.
#pragma once

#include <cmath>
#include <functional>

#include "dispatch.h"
#include "random.h"

namespace rlhfuse {

// What the walks look for. All caps and floors are in ticks of the network.
struct Goal {
    Time makespan = 0;           // the lower bound: no schedule is shorter
    Memory memory = 0;           // no schedule of that makespan takes less
    std::vector<Memory> limits;  // hard caps, [devices]
};

class Walker {
public:
    Walker(const Network& network, const Goal& goal, std::uint64_t seed)
        : network_(network),
          reversed_(network.reversed()),
          goal_(goal),
          random_(seed),
          forwards_(network_),
          backwards_(reversed_),
          tails_(network.tails()),
          key_(network.subtasks),
          one_of_each_(one_of_each(network)),
          caps_(goal.limits) {
        policy_.rank.resize(network.pipelines);
    }

    // Runs until `turns()` has reached `until` or `stop()` says so. `best` is what all walks have
    // found so far; `tighten` asks for less memory at its makespan, else for a shorter makespan.
    template <class Stop>
    void walk(const Schedule& best, bool tighten, std::int64_t until, const Stop& stop) {
        if (tighten != tighten_ || best.makespan < target_) walking_ = false;
        tighten_ = tighten;
        target_ = tighten ? best.makespan : goal_.makespan;
        stop_ = stop;
        if (better(best, found_)) found_ = best;
        while (turns_ < until && !stop() && !done()) {
            if (!walking_) {
                begin();
            } else {
                step();
            }
        }
    }

    const Schedule& found() const { return found_; }
    std::int64_t turns() const { return turns_; }

    bool done() const { return found_.makespan <= goal_.makespan && found_.peak <= goal_.memory; }

    // Shorter is better; of two equally long schedules the one that takes less memory.
    static bool better(const Schedule& a, const Schedule& b) {
        return a.makespan < b.makespan || (a.makespan == b.makespan && a.peak < b.peak);
    }

private:
    static constexpr int kFreshStarts = 12;  // random list schedules of which the best is walked
    static constexpr int kFreshTurns = 6;    // turns each of them gets
    static constexpr int kRepairTurns = 2;   // turns that a worsened schedule gets to recover
    // Steps without gain before a walk is given up: few at first, more after every walk that fails.
    // Restarts are cheap where schedules are plenty, and long walks are needed where they are rare.
    static constexpr double kShortest = 60;
    static constexpr double kLongest = 2000;
    static constexpr double kGrowth = 1.3;
    // Caps of less than this many micro-batches of every slot are tight.
    static constexpr Memory kTight = 2;

    void begin() {
        walking_ = true;
        stalled_ = 0;
        if (!tighten_) {
            cap_ = kNoLimit;
            apply_cap();
            start_fresh();
            settle();
            return;
        }
        const Memory room = found_.peak - 1 - goal_.memory;
        if (random_.chance(0.5)) {
            cap_ = found_.peak - 1;
            apply_cap();
            current_ = found_;
            draw_policy();
            turn(current_, Noise{});
        } else {
            const double share = random_.unit();
            cap_ = goal_.memory + static_cast<Memory>(double(room) * (1.0 - 0.7 * share * share));
            apply_cap();
            start_fresh();
        }
        settle();
    }

    void step() {
        draw_policy();
        trial_ = current_;
        turn(trial_, draw_noise());
        for (int i = 0; i < kRepairTurns && lost(trial_); ++i) {
            draw_policy();
            turn(trial_, Noise{});
        }
        stalled_ = trial_.makespan < current_.makespan ? 0 : stalled_ + 1;
        if (trial_.makespan <= current_.makespan) std::swap(current_, trial_);
        settle();
        if (stalled_ > patience_) {
            walking_ = false;
            patience_ = std::min(kLongest, patience_ * kGrowth);
        }
    }

    // Worse than the current schedule, but not failed: further turns may repair it.
    bool lost(const Schedule& schedule) const {
        return schedule.makespan != kNever && schedule.makespan > current_.makespan;
    }

    // Records the current schedule if it is a gain; under the target, lowers the cap and goes on.
    void settle() {
        if (current_.makespan == kNever) {
            walking_ = false;
            return;
        }
        if (better(current_, found_)) found_ = current_;
        if (!tighten_ || current_.makespan > target_) return;
        stalled_ = 0;
        patience_ = kShortest;
        const double share = random_.unit();
        const double room = double(std::max<Memory>(0, current_.peak - 1 - goal_.memory));
        cap_ = current_.peak - 1 - static_cast<Memory>(0.3 * share * share * share * room);
        apply_cap();
        draw_policy();
        turn(current_, Noise{});
        if (current_.makespan == kNever) walking_ = false;
    }

    // The best of some random list schedules under the cap. Urgency is the way to go to the end of
    // the micro-batch, plus a share of the work still behind it in its stream, plus noise.
    void start_fresh() {
        current_.makespan = kNever;
        for (int start = 0; start < kFreshStarts; ++start) {
            draw_policy();
            policy_.window = kNever;
            policy_.reserve_by_key = false;
            policy_.careful = true;
            const bool flip = random_.chance(0.5);
            for (int p = 0; p < network_.pipelines; ++p) {
                policy_.rank[p] = flip ? network_.pipelines - p : p;
            }
            const double behind = 3.0 * random_.unit();
            const double scale = double(longest());
            const double noise = 3.0 * scale * square(random_.unit());
            const double release_first = 10.0 * scale * (random_.unit() - 0.5);
            for (std::size_t s = 0; s < tails_.size(); ++s) {
                const Stream& stream = network_.streams[s];
                for (int k = 0; k < stream.count; ++k) {
                    const double left = double(stream.count - 1 - k) * double(stream.duration);
                    const double urgency = double(tails_[s]) + behind * left +
                                           noise * random_.unit() +
                                           (stream.acquires ? -release_first : release_first);
                    key_[stream.first + k] = -static_cast<Time>(urgency);
                }
            }
            forwards_.run(key_, caps_, policy_, trial_);
            for (int i = 0; i < kFreshTurns && trial_.makespan != kNever; ++i) {
                if (trial_.makespan < current_.makespan) current_ = trial_;
                draw_policy();
                turn(trial_, Noise{});
            }
            if (trial_.makespan < current_.makespan) current_ = trial_;
            if (current_.makespan <= target_ || stop_()) return;
        }
    }

    // A stretch of time and a set of devices whose keys are blurred by up to `width`.
    struct Noise {
        double width = 0.0;
        double begin = 0.0;
        double end = 0.0;
        std::uint64_t devices = 0;
    };

    Noise draw_noise() {
        Noise noise;
        const double length = square(random_.unit()) * double(current_.makespan);
        noise.begin = random_.unit() * double(current_.makespan);
        noise.end = noise.begin + length;
        noise.width = 0.1 * double(longest()) * std::exp(7.0 * random_.unit());
        noise.devices = ~std::uint64_t{0};
        if (random_.chance(0.5)) {
            noise.devices = std::uint64_t(random_.unit() * 0x1p32) |
                            std::uint64_t(random_.unit() * 0x1p32) << 32;
        }
        return noise;
    }

    void draw_policy() {
        const int kind = random_.below(3);
        policy_.patience = kind == 0 ? 0.0 : kind == 1 ? 1.0 : random_.unit();
        policy_.window = kNever;
        if (random_.chance(0.5)) {
            const double widest = std::log(double(goal_.makespan) + 1.0);
            policy_.window = static_cast<Time>(std::exp(random_.unit() * widest));
        }
        policy_.reserve_by_key = random_.chance(0.5);
        policy_.careful = !tight_ || random_.chance(0.5);
    }

    // One turn: list schedule backwards by the end times, then forwards by those of the result.
    void turn(Schedule& schedule, const Noise& noise) {
        ++turns_;
        for (const Stream& stream : network_.streams) {
            const bool blurred = noise.devices >> (stream.device % 64) & 1;
            for (int k = 0; k < stream.count; ++k) {
                const Time end = schedule.start[stream.first + k] + stream.duration;
                Time key = schedule.makespan - end;
                if (blurred && double(end) >= noise.begin && double(end) <= noise.end) {
                    key += static_cast<Time>((random_.unit() - 0.5) * noise.width);
                }
                key_[stream.first + stream.count - 1 - k] = key;
            }
        }
        backwards_.run(key_, caps_, policy_, mirror_);
        if (mirror_.makespan == kNever) {
            schedule.makespan = kNever;
            return;
        }
        for (const Stream& stream : network_.streams) {
            for (int k = 0; k < stream.count; ++k) {
                const Time end = mirror_.start[stream.first + k] + stream.duration;
                key_[stream.first + stream.count - 1 - k] = mirror_.makespan - end;
            }
        }
        forwards_.run(key_, caps_, policy_, schedule);
    }

    // Under caps that hold few micro-batches, the room that a careful list schedule leaves is a
    // good part of all there is.
    void apply_cap() {
        tight_ = false;
        for (int d = 0; d < network_.devices; ++d) {
            caps_[d] = std::min(goal_.limits[d], cap_);
            tight_ |= caps_[d] / kTight < one_of_each_[d];
        }
    }

    // Per device, the activations of a micro-batch of every slot.
    static std::vector<Memory> one_of_each(const Network& network) {
        std::vector<Memory> sum(network.devices, 0);
        for (const Stream& stream : network.streams) {
            if (stream.acquires) sum[stream.device] += stream.activation;
        }
        return sum;
    }

    Time longest() const {
        Time longest = 1;
        for (const Stream& stream : network_.streams) longest = std::max(longest, stream.duration);
        return longest;
    }

    static double square(double x) { return x * x; }

    const Network& network_;
    const Network reversed_;
    const Goal& goal_;
    std::function<bool()> stop_;
    Random random_;
    Dispatcher forwards_;
    Dispatcher backwards_;
    Policy policy_;
    const std::vector<Time> tails_;
    std::vector<Time> key_;
    const std::vector<Memory> one_of_each_;
    std::vector<Memory> caps_;
    bool tight_ = false;
    Memory cap_ = kNoLimit;
    Schedule current_, trial_, mirror_, found_;
    Time target_ = kNever;
    bool tighten_ = false;
    bool walking_ = false;
    int stalled_ = 0;
    double patience_ = kShortest;
    std::int64_t turns_ = 0;
};

}  // namespace rlhfuse
