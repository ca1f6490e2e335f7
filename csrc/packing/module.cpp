// Python's view of packing on the host, and the classes that describe a pass on any device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "pack.h"

namespace py = pybind11;

namespace rlhfuse::packing {
namespace {

void move_fields(const std::vector<Field>& fields, std::int64_t threads) {
    py::gil_scoped_release release;
    check(fields, Array::host);
    move(fields, threads);
}

PYBIND11_MODULE(_packing, m) {
    m.doc() = "Segmented copies with fill; use megatron_rlhfuse.dispatch.packing.";
    py::class_<Array>(m, "Array")
        .def(py::init<std::uintptr_t, const std::string&, std::int64_t, int>(), py::arg("address"),
             py::arg("dtype"), py::arg("elements"), py::arg("device"));
    py::class_<Segments>(m, "Segments")
        .def(py::init([](const Array& source_starts, const Array& target_starts,
                         const Array& lengths, const Array& rooms) {
                 return Segments{source_starts, target_starts, lengths, rooms};
             }),
             py::arg("source_starts"), py::arg("target_starts"), py::arg("lengths"),
             py::arg("rooms"));
    py::class_<Field>(m, "Field")
        .def(py::init([](const Segments& segments, const Array& target, const Array& fill,
                         const Array* source, const Array* each) {
                 return Field{segments, target, fill, source ? *source : Array{},
                              each ? *each : Array{}};
             }),
             py::arg("segments"), py::arg("target"), py::arg("fill"), py::arg("source").none(true),
             py::arg("each").none(true));
    m.def("move", &move_fields, py::arg("fields"), py::arg("threads"));
}

}  // namespace
}  // namespace rlhfuse::packing
