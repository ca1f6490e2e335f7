// Python binding of the schedule search: the module megatron_rlhfuse._planner.
//
// Checks here guard memory safety; megatron_rlhfuse/schedule/search.py makes the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "annealing.h"
#include "greedy.h"
#include "search.h"

namespace py = pybind11;

namespace rlhfuse {
namespace {

// pipeline, device, slot, count, depth, duration, activation, acquires, releases
using StreamRow = std::tuple<int, int, int, int, int, Time, Memory, bool, bool>;
// from, to, delay
using LinkRow = std::tuple<int, int, Time>;
// start of each subtask, makespan, peak activation
using ScheduleRow = std::tuple<std::vector<Time>, Time, Memory>;

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

Network make_network(const std::vector<StreamRow>& streams, const std::vector<LinkRow>& links,
                     int devices) {
    constexpr Time kLargest = kNever / 8;
    Network network;
    network.devices = devices;
    Time total = 0;
    for (const auto& [pipeline, device, slot, count, depth, duration, activation, acquires,
                      releases] : streams) {
        require(
            pipeline >= 0 && device >= 0 && device < devices && slot >= 0 && count > 0 && depth > 0,
            "a stream is out of range");
        require(duration > 0 && activation >= 0,
                "durations are positive, activations not negative");
        require(duration < (kLargest - total) / count, "times are too large");
        total += duration * count;
        Stream stream;
        stream.pipeline = pipeline;
        stream.device = device;
        stream.slot = slot;
        stream.count = count;
        stream.depth = depth;
        stream.duration = duration;
        stream.activation = activation;
        stream.acquires = acquires;
        stream.releases = releases;
        network.add(stream);
    }
    const int size = static_cast<int>(streams.size());
    for (const auto& [from, to, delay] : links) {
        require(from >= 0 && from < size && to >= 0 && to < size && delay >= 0,
                "a link is out of range");
        require(network.streams[from].count == network.streams[to].count,
                "linked streams differ in length");
        require(
            network.streams[from].after[1].stream < 0 && network.streams[to].before[1].stream < 0,
            "a stream has more than two links on a side");
        network.connect(from, to, delay);
    }
    network.index_devices();
    return network;
}

ScheduleRow to_row(const Schedule& schedule) {
    return {schedule.start, schedule.makespan, schedule.peak};
}

Schedule from_row(const Network& network, const ScheduleRow& row) {
    Schedule schedule;
    std::tie(schedule.start, schedule.makespan, schedule.peak) = row;
    require(static_cast<int>(schedule.start.size()) == network.subtasks,
            "a schedule has one start per subtask");
    return schedule;
}

void require_limits(const Network& network, const std::vector<Memory>& limits) {
    require(static_cast<int>(limits.size()) == network.devices, "one limit per device");
}

// For benchmarks: tries random swaps of neighbours from `start`, none of which may lengthen it by
// more than `slack`; `full`: evaluates each from scratch besides. Returns the swaps evaluated,
// those applied, the heads and tails recomputed, and the seconds taken.
std::tuple<std::int64_t, std::int64_t, std::int64_t, double> try_swaps(
    const Network& network, const ScheduleRow& start, std::int64_t swaps, Time slack,
    std::uint64_t seed, bool full) {
    Incremental orders(network, from_row(network, start));
    Random random(seed);
    std::vector<Time> starts;
    const Time limit = orders.makespan() + slack;
    std::int64_t applied = 0;
    const auto began = std::chrono::steady_clock::now();
    for (std::int64_t done = 0; done < swaps;) {
        const int subtask = random.below(network.subtasks);
        if (!orders.may_swap(subtask)) continue;
        applied += orders.try_swap(subtask, limit);
        if (full) orders.full_evaluation(starts);
        ++done;
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    return {swaps, applied, orders.touched(), took.count()};
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
    m.doc() = "Search for fused pipeline schedules; use megatron_rlhfuse.schedule.search.";
    m.attr("NO_LIMIT") = kNoLimit;
    m.attr("FAILED") = kNever;

    py::class_<Network>(m, "Network")
        .def(py::init(&make_network), py::arg("streams"), py::arg("links"), py::arg("devices"))
        .def_readonly("subtasks", &Network::subtasks);

    m.def(
        "greedy",
        [](const Network& network, const std::vector<Memory>& limits) {
            require_limits(network, limits);
            py::gil_scoped_release release;
            return to_row(greedy(network, limits));
        },
        py::arg("network"), py::arg("limits"));

    py::class_<Search>(m, "Search")
        .def(py::init([](const Network& network, Time makespan, Memory memory,
                         const std::vector<Memory>& limits, std::uint64_t seed, int walks) {
                 require_limits(network, limits);
                 require(walks > 0, "at least one walk");
                 return std::make_unique<Search>(network, Goal{makespan, memory, limits}, seed,
                                                 walks);
             }),
             py::arg("network"), py::arg("makespan"), py::arg("memory"), py::arg("limits"),
             py::arg("seed"), py::arg("walks"))
        .def("run", &Search::run, py::arg("threads"), py::arg("seconds"), py::arg("turns"),
             py::arg("tighten"), py::call_guard<py::gil_scoped_release>())
        .def("offer", [](Search& search,
                         const ScheduleRow& row) { search.offer(from_row(search.network(), row)); })
        .def("best", [](const Search& search) { return to_row(search.best()); })
        .def_property_readonly("at_bound", &Search::at_bound)
        .def_property_readonly("done", &Search::done);

    py::class_<Annealing>(m, "Annealing")
        .def(py::init([](const Network& network, Time makespan, Memory memory,
                         const std::vector<Memory>& limits, const ScheduleRow& start,
                         std::uint64_t seed, double seconds, std::int64_t moves) {
                 require_limits(network, limits);
                 auto annealing = std::make_unique<Annealing>(
                     network, Goal{makespan, memory, limits}, from_row(network, start), seed);
                 annealing->plan(seconds, moves);
                 return annealing;
             }),
             py::arg("network"), py::arg("makespan"), py::arg("memory"), py::arg("limits"),
             py::arg("start"), py::arg("seed"), py::arg("seconds"), py::arg("moves"))
        .def("run", &Annealing::run, py::arg("seconds"), py::arg("moves"), py::arg("tighten"),
             py::call_guard<py::gil_scoped_release>())
        .def("best", [](const Annealing& annealing) { return to_row(annealing.best()); });
    m.attr("UNPLANNED") = Annealing::kUnplanned;

    m.def("try_swaps", &try_swaps, py::arg("network"), py::arg("start"), py::arg("swaps"),
          py::arg("slack"), py::arg("seed"), py::arg("full"),
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace rlhfuse
