// The greedy schedule: the best of a few plain list schedules. Milliseconds, deterministic.
#pragma once

#include "dispatch.h"
#include "walker.h"

namespace rlhfuse {

// Most urgent first, by each of four notions of urgency, with and without patience.
inline Schedule greedy(const Network& network, const std::vector<Memory>& caps) {
    const std::vector<Time> tails = network.tails();
    Dispatcher dispatcher(network);
    Policy policy;
    policy.limit_depth = true;
    policy.rank.resize(network.pipelines);
    std::iota(policy.rank.begin(), policy.rank.end(), 0);
    std::vector<Time> key(network.subtasks);
    Schedule best, trial;
    for (const int remaining : {0, 1}) {  // whether work behind it in its stream counts
        for (const bool release_first : {false, true}) {  // what frees memory before what takes it
            for (std::size_t s = 0; s < tails.size(); ++s) {
                const Stream& stream = network.streams[s];
                const Time bonus = release_first && !stream.acquires ? kNever / 4 : 0;
                for (int k = 0; k < stream.count; ++k) {
                    const Time behind = remaining * (stream.count - 1 - k) * stream.duration;
                    key[stream.first + k] = -(tails[s] + behind) - bonus;
                }
            }
            for (const double patience : {0.0, 1.0}) {
                policy.patience = patience;
                dispatcher.run(key, caps, policy, trial);
                if (Walker::better(trial, best)) best = trial;
            }
        }
    }
    return best;
}

}  // namespace rlhfuse
