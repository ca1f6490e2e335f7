// The guided search on all cores: walks that share the best schedule after every round.
//
// Invariant: bounded by turns alone, the result depends on network, goal, seed and the number of
// walks, not on the number of threads or the speed of the machine.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "walker.h"

namespace rlhfuse {

class Search {
public:
    Search(Network network, Goal goal, std::uint64_t seed, int walks)
        : network_(std::move(network)), goal_(std::move(goal)) {
        for (int i = 0; i < walks; ++i) {
            walkers_.push_back(std::make_unique<Walker>(
                network_, goal_, seed * 0x9E3779B97F4A7C15ULL + static_cast<std::uint64_t>(i)));
        }
    }

    Search(const Search&) = delete;
    Search& operator=(const Search&) = delete;

    // Goes on for at most `seconds` or `turns` in all; `tighten`: lower the memory at the best
    // makespan so far, else shorten it. Stops early when the goal is met (when tightening), or the
    // makespan is at its bound (else). Returns the turns done.
    std::int64_t run(int threads, double seconds, std::int64_t turns, bool tighten) {
        using Clock = std::chrono::steady_clock;
        const auto began = Clock::now();
        const std::int64_t before = total_turns();
        auto late = [&] {
            return std::chrono::duration<double>(Clock::now() - began).count() >= seconds;
        };
        while (!late() && !(tighten ? done() : at_bound())) {
            const std::int64_t left = turns - (total_turns() - before);
            if (left <= 0) break;
            const auto walks = static_cast<std::int64_t>(walkers_.size());
            const std::int64_t share = std::min(kRound, std::max<std::int64_t>(1, left / walks));
            std::atomic<int> next{0};
            std::exception_ptr failure;
            std::mutex failing;
            auto work = [&] {
                try {
                    for (int i = next++; i < static_cast<int>(walks); i = next++) {
                        Walker& walker = *walkers_[i];
                        walker.walk(best_, tighten, walker.turns() + share, late);
                    }
                } catch (...) {
                    const std::lock_guard<std::mutex> lock(failing);
                    failure = std::current_exception();
                }
            };
            std::vector<std::thread> others;
            try {
                for (int t = 1; t < std::min<int>(threads, static_cast<int>(walks)); ++t) {
                    others.emplace_back(work);
                }
            } catch (const std::system_error&) {
                // The system gives no more threads: those that there are do all the work.
            }
            work();
            for (std::thread& other : others) other.join();
            if (failure) std::rethrow_exception(failure);
            for (const auto& walker : walkers_) {
                if (Walker::better(walker->found(), best_)) best_ = walker->found();
            }
        }
        return total_turns() - before;
    }

    // Takes a schedule found elsewhere as the best so far if it is better.
    void offer(const Schedule& schedule) {
        if (Walker::better(schedule, best_)) best_ = schedule;
    }

    const Network& network() const { return network_; }
    const Schedule& best() const { return best_; }
    bool at_bound() const { return best_.makespan <= goal_.makespan; }
    bool done() const { return at_bound() && best_.peak <= goal_.memory; }

private:
    static constexpr std::int64_t kRound = 64;  // turns of each walk between two exchanges

    std::int64_t total_turns() const {
        std::int64_t sum = 0;
        for (const auto& walker : walkers_) sum += walker->turns();
        return sum;
    }

    const Network network_;
    const Goal goal_;
    std::vector<std::unique_ptr<Walker>> walkers_;
    Schedule best_;
};

}  // namespace rlhfuse
