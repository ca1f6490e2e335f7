// Cuts items into groups of nearly equal cost: largest differencing, then local improvement.
//
// Largest differencing (Karmarkar and Karp, 1982) keeps partial partitions into k groups. It takes
// the two whose groups differ most, and joins the heaviest groups of one with the lightest of the
// other. With equal counts it starts from the k heaviest items, one in each group, the next k, and
// so on (balanced differencing, Michiels et al., 2003): every partition then adds one item to each
// group.
//
// Invariants
// - every item is in exactly one group; with equal counts their sizes differ by at most one;
// - improvement never makes the heaviest group heavier;
// - the result depends on the costs alone: ties are decided by the numbers of items.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <queue>
#include <vector>

namespace rlhfuse {

using Item = std::int32_t;

namespace detail {

// A group of a partial partition: its cost, and its items as a chain.
struct Chain {
    double cost = 0;
    Item first = -1;
    Item last = -1;
};

// By falling cost; groups without items are not listed.
using Partition = std::vector<Chain>;

class Differencing {
public:
    Differencing(const std::vector<double>& costs, std::size_t groups)
        : costs_(costs), groups_(groups), next_(costs.size(), -1) {}

    Partition run(const std::vector<Item>& by_cost, bool equal_counts) {
        const std::size_t width = equal_counts ? groups_ : 1;
        for (std::size_t start = 0; start < by_cost.size(); start += width) {
            Partition part;
            for (std::size_t i = start; i < std::min(start + width, by_cost.size()); ++i)
                part.push_back({costs_[by_cost[i]], by_cost[i], by_cost[i]});
            push(std::move(part));
        }
        while (heap_.size() > 1) {
            const std::size_t one = pop(), other = pop();
            push(join(std::move(parts_[one]), std::move(parts_[other])));
        }
        return heap_.empty() ? Partition{} : std::move(parts_[pop()]);
    }

    Item next(Item item) const { return next_[item]; }

private:
    struct Entry {
        double difference;
        std::size_t part;
        bool operator<(const Entry& other) const {
            return difference != other.difference ? difference < other.difference
                                                  : part > other.part;
        }
    };

    void push(Partition part) {
        const double lightest = part.size() == groups_ ? part.back().cost : 0.0;
        heap_.push({part.front().cost - lightest, parts_.size()});
        parts_.push_back(std::move(part));
    }

    std::size_t pop() {
        const std::size_t part = heap_.top().part;
        heap_.pop();
        return part;
    }

    // The heaviest of one with the lightest of the other, empty groups being the lightest.
    Partition join(Partition one, const Partition& other) {
        const std::size_t before = one.size();
        // Where nothing meets, both are in order already; else the tail of `one` is not any more.
        std::size_t ordered = before;
        for (std::size_t j = 0; j < other.size(); ++j) {
            const std::size_t i = groups_ - 1 - j;
            if (i >= before) {
                one.push_back(other[j]);
                continue;
            }
            next_[one[i].last] = other[j].first;
            one[i].last = other[j].last;
            one[i].cost += other[j].cost;
            ordered = i;
        }
        const auto middle = one.begin() + static_cast<std::ptrdiff_t>(ordered);
        if (ordered < before) std::sort(middle, one.end(), heavier);
        std::inplace_merge(one.begin(), middle, one.end(), heavier);
        return one;
    }

    static bool heavier(const Chain& a, const Chain& b) {
        return a.cost != b.cost ? a.cost > b.cost : a.first < b.first;
    }

    const std::vector<double>& costs_;
    std::size_t groups_;
    std::vector<Item> next_;  // by item: the one behind it in its chain
    std::vector<Partition> parts_;
    std::priority_queue<Entry> heap_;
};

// Groups as lists of items, and exchanges between the heaviest and others.
class Improvement {
public:
    Improvement(const std::vector<double>& costs, std::vector<std::vector<Item>>& groups,
                bool equal_counts)
        : costs_(costs), groups_(groups), equal_counts_(equal_counts), sums_(groups.size()) {
        for (std::size_t g = 0; g < groups.size(); ++g) {
            std::sort(groups[g].begin(), groups[g].end(), Lighter{costs});
            sums_[g] = sum(g);
        }
    }

    // Ends when no exchange with the heaviest group helps, or after so many.
    void run(std::size_t exchanges) {
        const double mean =
            std::accumulate(sums_.begin(), sums_.end(), 0.0) / static_cast<double>(sums_.size());
        while (exchanges-- > 0) {
            const std::size_t heaviest = static_cast<std::size_t>(
                std::max_element(sums_.begin(), sums_.end()) - sums_.begin());
            if (sums_[heaviest] - mean <= kNegligible * mean || !relieve(heaviest)) return;
        }
    }

private:
    static constexpr double kNegligible = 1e-9;
    static constexpr Item kNothing = -1;

    struct Lighter {
        const std::vector<double>& costs;
        bool operator()(Item a, Item b) const {
            return costs[a] != costs[b] ? costs[a] < costs[b] : a < b;
        }
    };

    // What one group gives to another, and gets for it; either may be nothing.
    struct Exchange {
        Item given = kNothing;
        Item taken = kNothing;
        double miss = 0;  // distance from the cost that would make the two equal
    };

    double cost(Item item) const { return item == kNothing ? 0.0 : costs_[item]; }

    double sum(std::size_t group) const {
        double total = 0;
        for (const Item item : groups_[group]) total += costs_[item];
        return total;
    }

    bool relieve(std::size_t heaviest) {
        std::vector<std::size_t> order(groups_.size());
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
            return sums_[a] != sums_[b] ? sums_[a] < sums_[b] : a < b;
        });
        for (const std::size_t other : order) {
            if (other == heaviest) continue;
            const double gap = sums_[heaviest] - sums_[other];
            const Exchange found = best(heaviest, other, gap / 2);
            // It must move more than nothing, and less than the gap, by more than rounding.
            if (found.miss >= gap / 2 * (1 - kNegligible)) continue;
            apply(heaviest, other, found);
            return true;
        }
        return false;
    }

    // The exchange that moves a cost nearest to `wanted`.
    Exchange best(std::size_t from, std::size_t to, double wanted) const {
        const std::vector<Item>&giver = groups_[from], &taker = groups_[to];
        Exchange found{kNothing, kNothing, wanted};
        const auto consider = [&](Item given, Item taken) {
            const double miss = std::abs(cost(given) - cost(taken) - wanted);
            if (miss < found.miss) found = {given, taken, miss};
        };
        const bool may_move = !equal_counts_ || giver.size() > taker.size();
        std::size_t j = 0;  // the first of the takers that is too heavy for the giver's item
        for (const Item given : giver) {
            if (may_move) consider(given, kNothing);
            while (j < taker.size() && costs_[taker[j]] <= costs_[given] - wanted) ++j;
            if (j > 0) consider(given, taker[j - 1]);
            if (j < taker.size()) consider(given, taker[j]);
        }
        return found;
    }

    void apply(std::size_t from, std::size_t to, const Exchange& exchange) {
        move(from, to, exchange.given);
        move(to, from, exchange.taken);
        sums_[from] = sum(from);
        sums_[to] = sum(to);
    }

    void move(std::size_t from, std::size_t to, Item item) {
        if (item == kNothing) return;
        std::vector<Item>&source = groups_[from], &target = groups_[to];
        const Lighter lighter{costs_};
        source.erase(std::lower_bound(source.begin(), source.end(), item, lighter));
        target.insert(std::lower_bound(target.begin(), target.end(), item, lighter), item);
    }

    const std::vector<double>& costs_;
    std::vector<std::vector<Item>>& groups_;
    bool equal_counts_;
    std::vector<double> sums_;
};

}  // namespace detail

// The group of each item, numbered by falling cost. `costs`: at least 0 and finite.
inline std::vector<Item> balance(const std::vector<double>& costs, std::size_t groups,
                                 bool equal_counts) {
    std::vector<Item> by_cost(costs.size());
    std::iota(by_cost.begin(), by_cost.end(), 0);
    std::sort(by_cost.begin(), by_cost.end(),
              [&](Item a, Item b) { return costs[a] != costs[b] ? costs[a] > costs[b] : a < b; });
    std::vector<std::vector<Item>> found(groups);
    {
        detail::Differencing differencing(costs, groups);
        const detail::Partition partition = differencing.run(by_cost, equal_counts);
        for (std::size_t g = 0; g < partition.size(); ++g)
            for (Item item = partition[g].first; item >= 0; item = differencing.next(item))
                found[g].push_back(item);
    }
    detail::Improvement(costs, found, equal_counts).run(16 * groups);
    std::vector<double> sums(groups);
    std::vector<Item> order(groups), group_of(costs.size()), number(groups);
    for (std::size_t g = 0; g < groups; ++g)
        for (const Item item : found[g]) sums[g] += costs[item];
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](Item a, Item b) { return sums[a] > sums[b]; });
    for (std::size_t g = 0; g < groups; ++g) number[order[g]] = static_cast<Item>(g);
    for (std::size_t g = 0; g < groups; ++g)
        for (const Item item : found[g]) group_of[item] = number[g];
    return group_of;
}

}  // namespace rlhfuse
