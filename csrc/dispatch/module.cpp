// Python's view of the dispatch of samples.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "balance.h"

namespace py = pybind11;

namespace rlhfuse {
namespace {

using Costs = py::array_t<double, py::array::c_style | py::array::forcecast>;

py::array_t<Item> balance_array(const Costs& costs, py::ssize_t groups, bool equal_counts) {
    if (costs.ndim() != 1) throw std::invalid_argument("costs: want one dimension");
    if (groups < 1) throw std::invalid_argument("groups: want at least 1");
    if (costs.size() > std::numeric_limits<Item>::max())
        throw std::invalid_argument("costs: too many");
    const std::vector<double> values(costs.data(), costs.data() + costs.size());
    for (std::size_t i = 0; i < values.size(); ++i)
        if (!(values[i] >= 0) || std::isinf(values[i]))
            throw std::invalid_argument("costs[" + std::to_string(i) +
                                        "]: want a number of at least 0");
    std::vector<Item> found;
    {
        py::gil_scoped_release release;
        found = balance(values, static_cast<std::size_t>(groups), equal_counts);
    }
    return py::array_t<Item>(static_cast<py::ssize_t>(found.size()), found.data());
}

PYBIND11_MODULE(_dispatch, m) {
    m.doc() = "Who computes which samples; use megatron_rlhfuse.dispatch.";
    m.def("balance", &balance_array, py::arg("costs"), py::arg("groups"), py::arg("equal_counts"));
}

}  // namespace
}  // namespace rlhfuse
