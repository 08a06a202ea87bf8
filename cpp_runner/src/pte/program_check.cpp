#include "pte/program_check.h"

#include <algorithm>
#include <vector>

#include "pte/xnnpack_check.h"

namespace llama_runner {

namespace {

// The numbers below are those of ExecuTorch's schema/program.fbs.

enum ValueKind : uint8_t { kInt = 2, kTensor = 5, kIntList = 7, kTensorList = 10, kOptionalTensorList = 11, kKinds };
enum InstructionKind : uint8_t { kKernelCall = 1, kDelegateCall = 2 };

/// What stands in a tensor's memory when an instruction is reached.
enum class Memory : uint8_t { kNone, kConstant, kWritable };

struct Value {
    uint8_t kind;
    Memory memory;
    Table content;
};

struct Delegate {
    bool is_xnnpack;
    std::vector<External> externals;
};

class ProgramCheck {
  public:
    explicit ProgramCheck(Bytes file) : file_(file), base_(base_of(file)), program_(root_of(file)) {
        const Tables segments = program_.tables(4);
        for (size_t i = 0; i < segments.size(); ++i) {
            const Table segment = segments[i];
            segments_.push_back(
                part(part(file, base_, file.size() - base_), segment.scalar<uint64_t>(0), segment.scalar<uint64_t>(1)));
        }
    }

    void check() {
        std::map<std::string_view, uint64_t> named;
        const Tables data = program_.tables(7);
        for (size_t i = 0; i < data.size(); ++i) {
            const Table item = data[i];
            named.emplace(item.text(0), segment(item.scalar<uint32_t>(1)).size());
        }
        xnnpack_.emplace(std::move(named));
        const Tables plans = program_.tables(1);
        for (size_t i = 0; i < plans.size(); ++i) check_plan(plans[i]);
    }

  private:
    /// Returns where the data behind the program starts.
    static uint64_t base_of(Bytes file) {
        require(read<uint32_t>(file, 8) == 0x30306865, "it has no header");  // "eh00"
        const auto size = read<uint64_t>(file, 16);
        const auto base = read<uint64_t>(file, 24);
        require(size <= file.size() && (base == 0 || base >= size) && base <= file.size(), "its header is wrong");
        return base == 0 ? file.size() : base;
    }

    static Table root_of(Bytes file) { return Table::root(part(file, 0, read<uint64_t>(file, 16))); }

    Bytes segment(uint64_t index) const {
        require(index < segments_.size(), "it has too few segments");
        return segments_[index];
    }

    void check_plan(const Table& plan) {
        plan.text(0);
        require(plan.vector<int64_t>(8).size() > 0, "a method has no memory plan");
        values_.clear();
        const Tables values = plan.tables(2);
        for (size_t i = 0; i < values.size(); ++i) add_value(values[i]);
        for (const int32_t index : indices(plan, 3)) {
            Value& input = value(index);
            require(input.kind != kTensor || input.memory != Memory::kConstant, "an input of a method is a constant");
            input.memory = Memory::kWritable;
        }
        for (const int32_t index : indices(plan, 4)) {
            if (Value& output = value(index); output.memory == Memory::kNone) output.memory = Memory::kWritable;
        }
        delegates_.clear();
        const Tables delegates = plan.tables(7);
        for (size_t i = 0; i < delegates.size(); ++i) add_delegate(delegates[i]);
        const Tables chains = plan.tables(5);
        for (size_t i = 0; i < chains.size(); ++i) {
            const Tables instructions = chains[i].tables(2);
            for (size_t j = 0; j < instructions.size(); ++j) check_instruction(plan, instructions[j]);
        }
    }

    static std::vector<int32_t> indices(const Table& table, int field) {
        const auto found = table.vector<int32_t>(field);
        require(found.exists(), "a list is missing");
        std::vector<int32_t> result;
        for (size_t i = 0; i < found.size(); ++i) result.push_back(found[i]);
        return result;
    }

    /// Returns a value. A negative index becomes one that is too large.
    Value& value(uint64_t index) {
        require(index < values_.size(), "a value is out of range");
        return values_[index];
    }

    void add_value(const Table& item) {
        const auto kind = item.scalar<uint8_t>(0);
        require(kind >= 1 && kind < kKinds, "a value has an unknown kind");
        values_.push_back({kind, Memory::kNone, item.table(1)});
        const Table& content = values_.back().content;
        if (kind == kTensor) {
            const bool is_placed = content.has(6);
            values_.back().memory = is_placed                          ? Memory::kWritable
                                    : content.scalar<uint32_t>(5) != 0 ? Memory::kConstant
                                                                       : Memory::kNone;
            require(
                !content.has(9) || (content.table(9).scalar<int8_t>(2) == 0 && content.table(9).scalar<int8_t>(3) == 0),
                "a tensor is stored elsewhere");
        } else if (kind == kIntList) {
            const auto items = content.vector<int64_t>(0);
            for (size_t i = 0; i < items.size(); ++i)
                require(value(items[i]).kind == kInt, "a list of numbers has something else");
        } else if (kind == kTensorList || kind == kOptionalTensorList) {
            // ExecuTorch reads the tensors of a list when it reaches the list, so they must come first.
            for (const int32_t index : indices(content, 0)) {
                require((kind == kOptionalTensorList && index == -1) || value(index).kind == kTensor,
                        "a list of tensors has something else");
            }
        }
    }

    void add_delegate(const Table& item) {
        const Table data = item.table(1);
        const auto location = data.scalar<int8_t>(0);
        const auto index = data.scalar<uint32_t>(1);
        require(location == 0 || location == 1, "a delegate's data is in an unknown place");
        const Bytes payload = location == 1 ? segment(index) : program_.tables(3)[index].bytes(0);
        const Tables options = item.tables(2);
        for (size_t i = 0; i < options.size(); ++i) {
            options[i].text(0);
            options[i].bytes(1);
        }
        const bool is_xnnpack = item.text(0) == "XnnpackBackend";
        delegates_.push_back({is_xnnpack, is_xnnpack ? xnnpack_->check(payload) : std::vector<External>()});
    }

    void check_instruction(const Table& plan, const Table& instruction) {
        const auto kind = instruction.scalar<uint8_t>(0);
        require(kind == kKernelCall || kind == kDelegateCall, "it has an instruction that no language model has");
        const Table call = instruction.table(1);
        const auto called = call.scalar<int32_t>(0);
        const std::vector<int32_t> arguments = indices(call, 1);
        for (const int32_t index : arguments) value(index);
        if (kind == kKernelCall) return check_kernel(plan.tables(6)[called], arguments);
        require(static_cast<size_t>(called) < delegates_.size(), "it calls an unknown delegate");
        check_delegate(delegates_[static_cast<size_t>(called)], arguments);
    }

    void check_delegate(const Delegate& delegate, const std::vector<int32_t>& arguments) {
        for (const External& external : delegate.externals) {
            require(external.id < arguments.size(), "a call of a delegate has too few tensors");
            const Value& given = value(arguments[external.id]);
            require(given.kind == kTensor && given.memory != Memory::kNone &&
                        !(external.is_output && given.memory == Memory::kConstant) &&
                        given.content.scalar<int8_t>(0) == external.scalar_type,
                    "a call of a delegate has a tensor that does not fit");
            require(has_sizes(given.content, external.sizes), "a call of a delegate has a tensor of another size");
        }
        if (delegate.is_xnnpack) return;
        for (const int32_t index : arguments) require_memory(index);
    }

    /// Returns whether a tensor has these sizes, in this order. For XNNPACK a single number has one dimension.
    static bool has_sizes(const Table& tensor, const std::vector<uint32_t>& expected) {
        const auto sizes = tensor.vector<uint32_t>(2);
        const auto order = tensor.vector<uint8_t>(3);
        if (sizes.size() == 0) return expected == std::vector<uint32_t>{1};
        if (sizes.size() != expected.size() || order.size() != sizes.size()) return false;
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (sizes[i] != expected[i] || order[i] != i) return false;
        }
        return true;
    }

    void require_memory(int32_t index) {
        const Value& argument = value(index);
        if (argument.kind == kTensor) require(argument.memory != Memory::kNone, "a call has a tensor without memory");
        if (argument.kind != kTensorList && argument.kind != kOptionalTensorList) return;
        for (const int32_t item : indices(argument.content, 0)) {
            if (item >= 0) require_memory(item);
        }
    }

    void check_kernel(const Table& kernel, const std::vector<int32_t>& arguments) {
        const std::string_view name = kernel.text(0);
        kernel.text(1);
        if (name == "executorch_prim::et_view") return check_view(arguments);
        for (const int32_t index : arguments) require_memory(index);
        require(!name.ends_with('_') && name != "executorch_prim::et_copy_index",
                "it calls an operator that no language model has");
        if (name == "aten::sym_size") return check_size(arguments);
        if (!name.starts_with("executorch_prim::")) check_results(name, arguments);
    }

    /// A size of a tensor is a number, which no operator computes but ExecuTorch itself.
    void check_size(const std::vector<int32_t>& arguments) {
        require(arguments.size() == 3 && value(arguments[0]).kind == kTensor && value(arguments[1]).kind == kInt &&
                    value(arguments[2]).kind == kInt,
                "a size of a tensor is wrong");
    }

    /// A view gives its result the memory of its first argument.
    void check_view(const std::vector<int32_t>& arguments) {
        require(arguments.size() == 3 && value(arguments[0]).kind == kTensor && value(arguments[2]).kind == kTensor,
                "a view is wrong");
        require_memory(arguments[0]);
        value(arguments[2]).memory = value(arguments[0]).memory;
    }

    /// A call ends with its results, and then with what it returns: the same tensor, or a list of the same tensors.
    void check_results(std::string_view name, const std::vector<int32_t>& arguments) {
        require(!arguments.empty(), "a call has no results");
        const int32_t last = arguments.back();
        std::vector<int32_t> results{last};
        if (value(last).kind == kTensorList) results = indices(value(last).content, 0);
        const size_t count = results.size();
        const size_t end = arguments.size() - 1;
        const bool is_list = end >= 1 && arguments[end - 1] == last;
        const bool is_each = end >= count && std::equal(results.begin(), results.end(),
                                                        arguments.begin() + static_cast<ptrdiff_t>(end - count));
        require(is_list || is_each, "a call does not return its results");
        for (const int32_t index : results) {
            require(value(index).kind == kTensor && value(index).memory == Memory::kWritable,
                    "a call has a constant as its result");
        }
        if (!name.starts_with("llama_pte::")) return;
        // All tensors behind the last number or text are results.
        for (size_t i = end; i > 0 && value(arguments[i - 1]).kind == kTensor; --i) {
            require(value(arguments[i - 1]).memory == Memory::kWritable, "a call has a constant as its result");
        }
    }

    Bytes file_;
    uint64_t base_;
    Table program_;
    std::vector<Bytes> segments_;
    std::optional<XnnpackCheck> xnnpack_;
    std::vector<Value> values_;
    std::vector<Delegate> delegates_;
};

}  // namespace

std::optional<std::string> malformed(Bytes file) {
    try {
        ProgramCheck(file).check();
        return std::nullopt;
    } catch (const Malformed& found) {
        return found.problem;
    }
}

}  // namespace llama_runner
