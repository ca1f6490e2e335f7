// Checks of the search in C++ on small random networks, built with sanitizers by test_csrc.py:
// schedules against the definition, incremental evaluation against evaluation from scratch.
//
// Prints "ok", or the line of the check that failed with the number of the network.
#include <cstdio>
#include <cstdlib>

#include "annealing.h"
#include "greedy.h"
#include "search.h"

using namespace rlhfuse;

static int network_number = 0;

#define CHECK(holds)                                                                    \
    do {                                                                                \
        if (!(holds)) {                                                                 \
            std::printf("line %d, network %d: %s\n", __LINE__, network_number, #holds); \
            std::exit(1);                                                               \
        }                                                                               \
    } while (0)

struct Stage {
    Time forward, backward, weight;
    Memory activation;
};

// A pipeline over `devices`; its backward is split where `split`.
static void add_pipeline(Network& network, const std::vector<int>& devices,
                         const std::vector<Stage>& costs, int count, bool split, Time delay) {
    const int stages = static_cast<int>(devices.size());
    const int pipeline = network.pipelines;
    const int slot = network.slots;
    std::vector<int> forward, backward, weight;
    for (int s = 0; s < stages; ++s) {
        Stream stream;
        stream.pipeline = pipeline;
        stream.device = devices[s];
        stream.slot = slot + s;
        stream.count = count;
        stream.depth = stages - s;
        stream.activation = costs[s].activation;
        stream.duration = costs[s].forward;
        stream.acquires = true;
        forward.push_back(network.add(stream));
        stream.acquires = false;
        stream.releases = !split;
        stream.duration = costs[s].backward;
        backward.push_back(network.add(stream));
        if (!split) continue;
        stream.releases = true;
        stream.duration = costs[s].weight;
        weight.push_back(network.add(stream));
    }
    network.connect(forward[stages - 1], backward[stages - 1], 0);
    for (int s = 0; s + 1 < stages; ++s) {
        const Time lag = devices[s] == devices[s + 1] ? 0 : delay;
        network.connect(forward[s], forward[s + 1], lag);
        network.connect(backward[s + 1], backward[s], lag);
    }
    for (int s = stages - 1; split && s >= 0; --s) {
        network.connect(backward[s], weight[s], 0);
        for (int later = s + 1; later < stages; ++later) {
            if (devices[later] != devices[s]) continue;
            network.connect(weight[later], weight[s], 0);
            break;
        }
    }
}

static Network random_network(std::uint64_t seed) {
    Random random(seed);
    Network network;
    network.devices = 1 + random.below(4);
    const int pipelines = 1 + random.below(3);
    const Time delay = random.below(2) * random.below(4);
    for (int p = 0; p < pipelines; ++p) {
        std::vector<int> devices;
        std::vector<Stage> costs;
        for (int s = 1 + random.below(5); s > 0; --s) {
            devices.push_back(random.below(network.devices));
            costs.push_back({1 + random.below(9), 1 + random.below(9), 1 + random.below(9),
                             Memory{random.below(5)}});
        }
        add_pipeline(network, devices, costs, 1 + random.below(6), random.chance(0.4), delay);
    }
    network.index_devices();
    return network;
}

// Actor over all devices, critic the other way round, as RLHFuse draws them.
static Network opposite_network(int devices, int count, bool split, bool interleaved) {
    Network network;
    std::vector<int> down, up;
    for (int round = 0; round < (interleaved ? 2 : 1); ++round) {
        for (int d = 0; d < devices; ++d) down.push_back(d);
    }
    for (int d = devices - 1; d >= 0; --d) up.push_back(d);
    add_pipeline(network, down, std::vector<Stage>(down.size(), {5, 5, 5, 195}), count, split, 1);
    add_pipeline(network, up, std::vector<Stage>(up.size(), {3, 3, 2, 100}), count, split, 1);
    network.index_devices();
    return network;
}

// For each device, enough for one micro-batch of each pipeline alone: the least that is allowed.
static std::vector<Memory> smallest_caps(const Network& network) {
    std::vector<Memory> caps(network.devices, 0);
    for (int p = 0; p < network.pipelines; ++p) {
        std::vector<Memory> needed(network.devices, 0);
        for (const Stream& stream : network.streams) {
            if (stream.pipeline == p && stream.acquires) {
                needed[stream.device] += stream.activation;
            }
        }
        for (int d = 0; d < network.devices; ++d) caps[d] = std::max(caps[d], needed[d]);
    }
    return caps;
}

static Goal no_goal(const std::vector<Memory>& limits) { return {0, 0, limits}; }

// A schedule against the definition: every link, every device, every cap, and its own numbers.
static void check_schedule(const Network& network, const Schedule& schedule,
                           const std::vector<Memory>& caps) {
    CHECK(static_cast<int>(schedule.start.size()) == network.subtasks);
    Time latest = 0;
    Memory peak = 0;
    for (const Stream& stream : network.streams) {
        for (int k = 0; k < stream.count; ++k) {
            const Time start = schedule.start[stream.first + k];
            latest = std::max(latest, start + stream.duration);
            CHECK(start >= 0);
            for (const Link& link : stream.before) {
                if (link.stream < 0) continue;
                const Stream& other = network.streams[link.stream];
                CHECK(schedule.start[other.first + k] + other.duration + link.delay <= start);
            }
            if (k > 0) CHECK(schedule.start[stream.first + k - 1] + stream.duration <= start);
        }
    }
    for (int device = 0; device < network.devices; ++device) {
        std::vector<std::pair<Time, int>> row;
        for (const int s : network.on_device[device]) {
            const Stream& stream = network.streams[s];
            for (int k = 0; k < stream.count; ++k) {
                row.emplace_back(schedule.start[stream.first + k], s);
            }
        }
        std::sort(row.begin(), row.end());
        Memory used = 0;
        Time free = 0;
        for (const auto& [start, s] : row) {
            const Stream& stream = network.streams[s];
            CHECK(start >= free);
            free = start + stream.duration;
            if (stream.acquires) used += stream.activation;
            CHECK(used <= caps[device]);
            peak = std::max(peak, used);
            if (stream.releases) used -= stream.activation;
            CHECK(used >= 0);
        }
        CHECK(used == 0);
    }
    CHECK(schedule.makespan == latest);
    CHECK(schedule.peak == peak);
}

// The schedule with time running backwards, a schedule of the reversed network.
static Schedule mirrored(const Network& network, const Schedule& schedule) {
    Schedule mirror = schedule;
    for (const Stream& stream : network.streams) {
        for (int k = 0; k < stream.count; ++k) {
            mirror.start[stream.first + stream.count - 1 - k] =
                schedule.makespan - schedule.start[stream.first + k] - stream.duration;
        }
    }
    return mirror;
}

static void check_dispatch(const Network& network, std::uint64_t seed) {
    Random random(seed);
    const std::vector<Memory> smallest = smallest_caps(network);
    Dispatcher dispatcher(network);
    const Network backwards = network.reversed();
    Schedule schedule;
    std::vector<Time> key(network.subtasks);
    for (int trial = 0; trial < 20; ++trial) {
        std::vector<Memory> caps = smallest;
        for (Memory& cap : caps) cap = random.chance(0.2) ? kNoLimit : cap + random.below(6);
        Policy policy;
        policy.patience = random.below(3) / 2.0;
        policy.limit_depth = random.chance(0.3);
        policy.reserve_by_key = random.chance(0.2);
        if (random.chance(0.3)) policy.window = random.below(20);
        for (int p = 0; p < network.pipelines; ++p) {
            policy.rank.push_back(trial % 2 ? p : network.pipelines - p);
        }
        for (Time& each : key) each = random.below(60);
        dispatcher.run(key, caps, policy, schedule);
        if (schedule.makespan == kNever) {
            CHECK(policy.reserve_by_key);  // else no run may fail
        } else {
            check_schedule(network, schedule, caps);
            Schedule mirror = mirrored(network, schedule);
            const Time idle = *std::min_element(schedule.start.begin(), schedule.start.end());
            mirror.makespan -= idle;  // before the first start, now behind the last end
            check_schedule(backwards, mirror, caps);
        }
    }
}

static std::vector<std::vector<int>> exchanged(std::vector<std::vector<int>> orders, int subtask) {
    for (std::vector<int>& row : orders) {
        for (std::size_t i = 0; i + 1 < row.size(); ++i) {
            if (row[i] != subtask) continue;
            std::swap(row[i], row[i + 1]);
            return orders;
        }
    }
    return orders;
}

static void check_same(Incremental& orders, const Orders& expected, int subtasks) {
    CHECK(orders.orders() == expected.orders());
    CHECK(orders.makespan() == expected.makespan());
    CHECK(orders.peak() == expected.peak());
    for (int o = 0; o < subtasks; ++o) {
        CHECK(orders.start(o) == expected.start(o));
        CHECK(orders.tail(o) == expected.tail(o));
        CHECK(orders.level(o) == expected.level(o));
    }
    std::vector<Time> start;
    CHECK(orders.full_evaluation(start) == orders.makespan());
    CHECK(start == orders.schedule().start);
}

// Random swaps, each judged by building its orders from scratch.
static void check_swaps(const Network& network, std::uint64_t seed, int swaps) {
    Random random(seed);
    const std::vector<Memory> free(network.devices, kNoLimit);
    Incremental orders(network, greedy(network, free));
    int applied = 0, refused = 0;
    for (int i = 0; i < swaps; ++i) {
        const int u = random.below(network.subtasks);
        const auto before = orders.orders();
        const auto after = exchanged(before, u);
        const Orders old(network, before);
        Time reference = kNever;
        try {
            reference = Orders(network, after).makespan();
        } catch (const std::invalid_argument&) {
        }
        const int v = orders.next(u);
        if (!orders.may_swap(u)) {
            CHECK(v < 0 || reference == kNever);
            CHECK(!orders.try_swap(u, kNever / 4));
            check_same(orders, old, network.subtasks);
            continue;
        }
        const auto levels = orders.swapped_levels(u);
        const Time slack = random.chance(0.3) ? kNever / 4 : random.below(12) - 2;
        const Time limit = orders.makespan() + slack;
        const bool swapped = orders.try_swap(u, limit);
        CHECK(swapped == (reference <= limit));
        if (!swapped) {
            ++refused;
            check_same(orders, old, network.subtasks);
            continue;
        }
        ++applied;
        check_same(orders, Orders(network, after), network.subtasks);
        check_schedule(network, orders.schedule(), free);
        CHECK(orders.level(v) == levels.first && orders.level(u) == levels.second);
        if (random.chance(0.4)) {
            orders.undo();
            check_same(orders, old, network.subtasks);
            bool thrown = false;
            try {
                orders.undo();
            } catch (const std::logic_error&) {
                thrown = true;
            }
            CHECK(thrown);
        }
    }
    if (swaps >= 200) CHECK(applied > 0 && refused > 0);
}

static void check_search(const Network& network, std::uint64_t seed) {
    std::vector<Memory> caps = smallest_caps(network);
    for (Memory& cap : caps) cap += 200 * (seed % 2);
    const Schedule first = greedy(network, caps);
    CHECK(first.makespan != kNever);
    check_schedule(network, first, caps);
    std::vector<Schedule> found;
    for (const int threads : {1, 3}) {
        Search search(network, no_goal(caps), seed, 3);
        search.offer(first);
        search.run(threads, 1e9, 90, false);
        search.run(threads, 1e9, 90, true);
        check_schedule(network, search.best(), caps);
        CHECK(!Walker::better(first, search.best()));
        found.push_back(search.best());
    }
    CHECK(found[0].start == found[1].start);
}

// However an annealing is cut into calls, it is the same; it keeps to limits and never loses.
static void check_annealing(const Network& network, std::uint64_t seed) {
    const std::vector<Memory> caps = smallest_caps(network);
    const Schedule first = greedy(network, caps);
    constexpr std::int64_t kMoves = 1500;
    Annealing whole(network, no_goal(caps), first, seed);
    Annealing cut(network, no_goal(caps), first, seed);
    for (Annealing* each : {&whole, &cut}) each->plan(1.0, kMoves);
    Schedule before = first;
    for (const bool tighten : {false, true}) {
        const std::int64_t moves = whole.run(1e9, kMoves, tighten);
        for (std::int64_t done = 0; done < moves;) {
            done += cut.run(1e9, std::min<std::int64_t>(moves - done, 137 + done % 51), tighten);
        }
        CHECK(whole.best().start == cut.best().start);
        CHECK(whole.accepted() == cut.accepted());
        check_schedule(network, whole.best(), caps);
        CHECK(!Walker::better(before, whole.best()));
        before = whole.best();
    }
}

int main() {
    std::vector<Network> networks;
    for (std::uint64_t seed = 0; seed < 40; ++seed) networks.push_back(random_network(seed));
    for (const bool split : {false, true}) {
        for (const bool interleaved : {false, true}) {
            networks.push_back(opposite_network(4, 6, split, interleaved));
        }
    }
    for (const Network& network : networks) {
        const auto seed = static_cast<std::uint64_t>(network_number);
        for (const Network& direction : {network, network.reversed()}) {
            check_dispatch(direction, seed);
            check_swaps(direction, seed, network.subtasks > 60 ? 200 : 60);
        }
        check_search(network, seed);
        check_annealing(network, seed);
        ++network_number;
    }
    std::puts("ok");
}
