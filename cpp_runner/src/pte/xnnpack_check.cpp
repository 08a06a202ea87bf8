#include "pte/xnnpack_check.h"

#include <algorithm>
#include <array>
#include <limits>
#include <set>

namespace llama_runner {

namespace {

// The numbers below are those of ExecuTorch's backends/xnnpack/serialization/runtime_schema.fbs.

constexpr size_t kMostDimensions = 6;  // XNN_MAX_TENSOR_DIMS
constexpr uint32_t kMostExternals = 4096;
constexpr uint64_t kMostElements = uint64_t{1} << 40;  // so that products cannot overflow
constexpr uint32_t kNoId = std::numeric_limits<uint32_t>::max();

constexpr uint32_t kExternalInput = 1;
constexpr uint32_t kExternalOutput = 2;
constexpr uint32_t kTransposed = 1;

struct Datatype {
    uint64_t bits = 0;        // of an element of a constant; 0 if it cannot be one
    int8_t scalar_type = -1;  // of a tensor outside; -1 if it cannot be one
};

Datatype datatype_of(int16_t number) {
    switch (number) {
        case 1:  // fp32
            return {32, 6};
        case 2:  // fp16
            return {16, 5};
        case 3:  // qint8
            return {8, 1};
        case 4:  // quint8
            return {8, 0};
        case 6:  // qcint8
            return {8, -1};
        case 5:  // qint32
        case 7:  // qcint32
            return {32, -1};
        case 8:   // qcint4
        case 10:  // qbint4
            return {4, -1};
        case 12:  // int32
            return {32, 3};
        case 14:  // bf16
            return {16, 15};
        default:
            return {};
    }
}

enum ValueKind : uint8_t { kPlain = 1, kQuantised = 2 };
enum Quantisation : uint8_t { kPerChannel = 1, kPerGroup = 4 };

constexpr uint8_t kFullyConnected = 2;

/// The fields of a node: its inputs, its output, and vectors that must be as long as the first field says.
struct NodeFields {
    std::array<int, 5> inputs{-1, -1, -1, -1, -1};
    int output = -1;
    std::array<int, 2> vectors{-1, -1};
};

/// Returns the fields of a node that language models consist of; others are refused.
NodeFields fields_of(uint8_t type) {
    switch (type) {
        case 1:   // Add
        case 8:   // Div
        case 12:  // Minimum
        case 15:  // Multiply
        case 16:  // Subtract
        case 26:  // Maximum
        case 37:  // BatchMatrixMultiply
            return {{0, 1, -1, -1, -1}, 2, {-1, -1}};
        case kFullyConnected:
            return {{0, 1, 2, -1, -1}, 3, {-1, -1}};
        case 5:   // StaticTranspose
        case 20:  // StaticReshape
            return {{2, -1, -1, -1, -1}, 3, {1, -1}};
        case 35:  // StaticSlice
            return {{3, -1, -1, -1, -1}, 4, {1, 2}};
        case 32:  // Concatenate2
            return {{1, 2, -1, -1, -1}, 5, {-1, -1}};
        case 33:  // Concatenate3
            return {{1, 2, 3, -1, -1}, 5, {-1, -1}};
        case 34:  // Concatenate4
            return {{1, 2, 3, 4, -1}, 5, {-1, -1}};
        case 38:  // Concatenate5
            return {{1, 2, 3, 4, 7}, 5, {-1, -1}};
        case 25:  // LeakyReLU
        case 29:  // ELU
            return {{1, -1, -1, -1, -1}, 2, {-1, -1}};
        case 7:   // Conv2d
        case 9:   // StaticResizeBilinear2D
        case 10:  // StaticConstantPad
        case 11:  // AvgPooling2d
        case 13:  // DepthwiseConv2d
        case 14:  // MaxPooling2d
        case 21:  // ArgMaxPooling2d
        case 31:  // PReLU
        case 36:  // ScaledDotProductAttention
        case 39:  // ConvTranspose2d
            throw Malformed{"XNNPACK has a node that no language model has"};
        default:
            require(type >= 1 && type <= 47, "XNNPACK has an unknown node");
            return {{0, -1, -1, -1, -1}, 1, {-1, -1}};  // a function of each element, Softmax or Convert
    }
}

struct Value {
    std::vector<uint32_t> sizes;
    bool is_constant;
    uint32_t constant;
    int16_t datatype;
};

uint64_t product(const std::vector<uint32_t>& sizes) {
    uint64_t elements = 1;
    for (const uint32_t size : sizes) {
        require(size == 0 || elements <= kMostElements / size, "XNNPACK has a tensor that is too large");
        elements *= size;
    }
    return elements;
}

}  // namespace

/// One graph while it is checked.
class XnnpackGraph {
  public:
    XnnpackGraph(XnnpackCheck& program, Bytes payload) : program_(program), graph_(graph_of(payload)) {
        constants_ = graph_.tables(8);
        const auto offset = read<uint32_t>(payload, 18);
        constant_bytes_ = part(payload, offset, read<uint64_t>(payload, 22)).size();
        externals_ = graph_.scalar<uint32_t>(3);
        require(externals_ <= kMostExternals, "XNNPACK has too many inputs and outputs");
    }

    std::vector<External> check() {
        const Tables values = graph_.tables(2);
        for (size_t i = 0; i < values.size(); ++i) check_value(values[i]);
        const Tables nodes = graph_.tables(1);
        for (size_t i = 0; i < nodes.size(); ++i) check_node(nodes[i]);
        return found_;
    }

  private:
    /// Returns the graph behind a payload's header.
    static Table graph_of(Bytes payload) {
        require(read<uint32_t>(payload, 4) == 0x30304858, "XNNPACK has no header");  // "XH00"
        return Table::root(part(payload, read<uint32_t>(payload, 10), read<uint32_t>(payload, 14)));
    }

    /// Returns the bytes of a constant.
    uint64_t bytes_of(uint32_t constant) const {
        const Table data = constants_[constant];
        if (data.has(2)) {
            const auto found = program_.named_.find(data.text(2));
            require(found != program_.named_.end(), "XNNPACK needs data that the file lacks");
            return found->second;
        }
        const auto offset = data.scalar<uint64_t>(0);
        require(offset <= constant_bytes_, "a constant of XNNPACK lies outside");
        return constant_bytes_ - offset;
    }

    void check_value(const Table& value) {
        const auto kind = value.scalar<uint8_t>(0);
        require(kind == kPlain || kind == kQuantised, "XNNPACK has an unknown value");
        const Table wrapper = value.table(1);
        const Table tensor = kind == kQuantised ? wrapper.table(0) : wrapper;
        const auto sizes = tensor.vector<uint32_t>(2);
        require(sizes.size() <= kMostDimensions && sizes.size() == tensor.scalar<uint32_t>(1),
                "XNNPACK has a tensor with wrong dimensions");
        require(tensor.scalar<int16_t>(7) == 0, "XNNPACK has a tensor of an outdated form");
        Value read{{}, tensor.scalar<uint32_t>(3) != 0, tensor.scalar<uint32_t>(3), tensor.scalar<int16_t>(0)};
        for (size_t i = 0; i < sizes.size(); ++i) read.sizes.push_back(sizes[i]);
        const uint64_t elements = product(read.sizes);
        const Datatype datatype = datatype_of(read.datatype);
        const auto id = tensor.scalar<uint32_t>(6);
        if (read.is_constant) {
            require(datatype.bits > 0, "XNNPACK has a constant of a wrong type");
            require(bytes_of(read.constant) >= (elements * datatype.bits + 7) / 8,
                    "a constant of XNNPACK is too short");
            ready_.insert(id);
        }
        if (kind == kQuantised) check_scales(wrapper, read);
        check_external(tensor, read, datatype);
        require(values_.emplace(id, std::move(read)).second, "XNNPACK has two values of one name");
    }

    void check_scales(const Table& wrapper, const Value& value) {
        const auto kind = wrapper.scalar<uint8_t>(1);
        const Table scales = wrapper.table(2);
        if (kind != kPerChannel && kind != kPerGroup) return;
        const bool grouped = kind == kPerGroup;
        const auto dimension = scales.scalar<int32_t>(1);
        require(scales.has(0), "scales of XNNPACK are missing");
        require(dimension >= 0 && static_cast<size_t>(dimension) < value.sizes.size(),
                "XNNPACK has scales of a wrong dimension");
        uint64_t count = value.sizes[static_cast<size_t>(dimension)];
        if (grouped) {
            const auto group = scales.scalar<int32_t>(2);
            require(group > 0 && value.sizes.size() == 2, "XNNPACK has scales of a wrong group");
            count = product(value.sizes) / static_cast<uint64_t>(group);
        }
        const auto constant = scales.scalar<uint32_t>(grouped ? 4 : 2);
        require(constant != 0 ? bytes_of(constant) >= count * (grouped ? sizeof(uint16_t) : sizeof(float))
                              : scales.vector<float>(0).size() >= count,
                "scales of XNNPACK are too few");
    }

    void check_external(const Table& tensor, const Value& value, Datatype datatype) {
        const auto id = tensor.scalar<uint32_t>(4);
        const auto flags = tensor.scalar<uint32_t>(5);
        if (flags == 0) return require(id == kNoId, "XNNPACK has a wrong number of an input or output");
        require((flags == kExternalInput || flags == kExternalOutput) && id < externals_ && !value.is_constant &&
                    datatype.scalar_type >= 0,
                "XNNPACK has a wrong input or output");
        require(std::ranges::count(found_, id, &External::id) == 0, "XNNPACK has two inputs or outputs of one number");
        found_.push_back({id, flags == kExternalOutput, datatype.scalar_type, value.sizes});
        if (flags == kExternalInput) ready_.insert(tensor.scalar<uint32_t>(6));
    }

    const Value& value(uint32_t id) const {
        const auto found = values_.find(id);
        require(found != values_.end(), "XNNPACK has a node on an unknown value");
        return found->second;
    }

    void check_node(const Table& node) {
        const auto type = node.scalar<uint8_t>(0);
        const NodeFields fields = fields_of(type);
        const Table arguments = node.table(1);
        for (const int field : fields.inputs) {
            if (field < 0) continue;
            const auto id = arguments.scalar<uint32_t>(field);
            if (type == kFullyConnected && field == 2 && id == kNoId) continue;  // no bias
            require(ready_.contains(id), "XNNPACK has a node on a value that is not computed yet");
        }
        for (const int field : fields.vectors) {
            if (field < 0) continue;
            const size_t size = arguments.vector<uint32_t>(field).size();
            require(size <= kMostDimensions && size == arguments.scalar<uint32_t>(0),
                    "XNNPACK has a node with wrong dimensions");
        }
        const auto output = arguments.scalar<uint32_t>(fields.output);
        require(!value(output).is_constant && ready_.insert(output).second, "XNNPACK has a node with a wrong output");
        if (type == kFullyConnected) check_matrix(arguments);
    }

    /// Checks a product with a matrix, its sizes and those of its bias.
    void check_matrix(const Table& node) {
        const Value& x = value(node.scalar<uint32_t>(0));
        const Value& matrix = value(node.scalar<uint32_t>(1));
        require(matrix.is_constant && matrix.sizes.size() == 2 && !x.sizes.empty(),
                "XNNPACK has a product with no matrix");
        const bool transposed = (node.scalar<uint32_t>(4) & kTransposed) != 0;
        const uint32_t rows = matrix.sizes[transposed ? 1 : 0];
        require(x.sizes.back() == matrix.sizes[transposed ? 0 : 1], "XNNPACK has a matrix that does not fit its input");
        std::vector<uint64_t> shape{static_cast<uint64_t>(matrix.datatype), matrix.sizes[0], matrix.sizes[1],
                                    transposed};
        if (const auto id = node.scalar<uint32_t>(2); id != kNoId) {
            require(value(id).is_constant && product(value(id).sizes) == rows, "XNNPACK has a bias that does not fit");
            shape.push_back(static_cast<uint64_t>(value(id).datatype));
        }
        if (const Table data = constants_[matrix.constant]; data.has(2)) {
            const auto [packed, is_new] = program_.matrices_.emplace(data.text(2), shape);
            require(is_new || packed->second == shape, "XNNPACK has one matrix in two shapes");
        }
    }

    XnnpackCheck& program_;
    Table graph_;
    Tables constants_;
    uint64_t constant_bytes_ = 0;
    uint32_t externals_ = 0;
    std::map<uint32_t, Value> values_;
    /// Constants, inputs, and results of the nodes so far.
    std::set<uint32_t> ready_;
    std::vector<External> found_;
};

std::vector<External> XnnpackCheck::check(Bytes payload) { return XnnpackGraph(*this, payload).check(); }

}  // namespace llama_runner
