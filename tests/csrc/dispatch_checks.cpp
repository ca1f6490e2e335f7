// Checks of the balancing in C++ on random costs, built with sanitizers by test_csrc.py: every
// item in one group, sizes as asked for, and the same groups whatever else was computed before.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "balance.h"

using rlhfuse::balance;
using rlhfuse::Item;

namespace {

void require(bool holds, const char* what, std::size_t items, std::size_t groups) {
    if (holds) return;
    std::printf("%s: %zu items, %zu groups\n", what, items, groups);
    std::exit(1);
}

}  // namespace

int main() {
    std::mt19937_64 random(1);
    std::lognormal_distribution<double> draw(4, 1);
    for (int trial = 0; trial < 400; ++trial) {
        const std::size_t items = random() % 200, groups = 1 + random() % 20;
        std::vector<double> costs(items);
        for (double& cost : costs) cost = random() % 5 == 0 ? 0.0 : std::floor(draw(random));
        for (const bool equal_counts : {false, true}) {
            const std::vector<Item> found = balance(costs, groups, equal_counts);
            require(found.size() == items, "every item", items, groups);
            std::vector<std::size_t> sizes(groups);
            std::vector<double> sums(groups);
            for (std::size_t i = 0; i < items; ++i) {
                require(found[i] >= 0 && static_cast<std::size_t>(found[i]) < groups, "a group",
                        items, groups);
                ++sizes[found[i]];
                sums[found[i]] += costs[i];
            }
            const auto [least, most] = std::minmax_element(sizes.begin(), sizes.end());
            require(!equal_counts || *most - *least <= 1, "equal counts", items, groups);
            require(std::is_sorted(sums.rbegin(), sums.rend()), "falling costs", items, groups);
            require(balance(costs, groups, equal_counts) == found, "once more", items, groups);
        }
    }
    std::puts("ok");
}
