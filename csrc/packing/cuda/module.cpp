// Python's view of packing on a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../checks.h"
#include "../table.h"
#include "launch.h"

namespace py = pybind11;

namespace rlhfuse::packing::cuda {
namespace {

// Python allocates the table's two buffers and uploads it, with the allocators and streams of
// torch.
class Pass {
public:
    explicit Pass(const std::vector<Field>& fields)
        : device_(fields.empty() ? Array::host : fields.front().target.device),
          table_(checked(fields, device_)) {}

    std::int64_t table_elements() const { return table_.elements(); }

    void write_table(const Array& buffer) const {
        require(buffer, Array::host);
        table_.write(reinterpret_cast<std::int64_t*>(buffer.data));
    }

    void launch(const Array& table, std::uintptr_t stream) const {
        require(table, device_);
        const std::vector<FieldView> views = table_.views(table.int64s());
        py::gil_scoped_release release;
        cuda::launch(views, device_, reinterpret_cast<void*>(stream));
    }

private:
    static const std::vector<Field>& checked(const std::vector<Field>& fields, int device) {
        if (device == Array::host)
            throw std::invalid_argument("fields[0].target: want it on a CUDA device");
        check(fields, device);
        return fields;
    }

    void require(const Array& table, int device) const {
        if (table.device != device || !table.given() || *table.type != type_named("int64") ||
            table.elements != table_.elements())
            throw std::invalid_argument("table: want int64 [table_elements] on " +
                                        detail::place(device));
    }

    int device_;
    Table table_;
};

PYBIND11_MODULE(_packing_cuda, m) {
    m.doc() = "Segmented copies with fill on a GPU; use megatron_rlhfuse.dispatch.packing.";
    py::module_::import("megatron_rlhfuse._packing");  // it has the class Field
    m.def("devices", &devices);
    m.def("architectures", &architectures);
    py::class_<Pass>(m, "Pass")
        .def(py::init<const std::vector<Field>&>(), py::arg("fields"))
        .def_property_readonly("table_elements", &Pass::table_elements)
        .def("write_table", &Pass::write_table, py::arg("buffer"))
        .def("launch", &Pass::launch, py::arg("table"), py::arg("stream"));
}

}  // namespace
}  // namespace rlhfuse::packing::cuda
