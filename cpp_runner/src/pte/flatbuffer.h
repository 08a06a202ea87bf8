#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

/// A reader of flatbuffers that trusts no byte of them.
namespace llama_runner {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

/// What is wrong with a file; thrown while it is checked, and caught there.
struct Malformed {
    const char* problem;
};

inline void require(bool holds, const char* problem) {
    if (!holds) throw Malformed{problem};
}

using Bytes = std::span<const std::byte>;

/// Returns a part of the bytes.
inline Bytes part(Bytes bytes, uint64_t offset, uint64_t size) {
    require(offset <= bytes.size() && size <= bytes.size() - offset, "a part of it lies outside");
    return bytes.subspan(offset, size);
}

template <typename T>
T read(Bytes bytes, uint64_t offset) {
    T value;
    std::memcpy(&value, part(bytes, offset, sizeof value).data(), sizeof value);
    return value;
}

/// A vector in a flatbuffer. A missing one is empty.
template <typename T>
class Vector {
  public:
    Vector() = default;
    Vector(Bytes buffer, uint64_t position)
        : exists_(true),
          items_(part(buffer, position + sizeof(uint32_t), read<uint32_t>(buffer, position) * uint64_t{sizeof(T)})) {}

    bool exists() const { return exists_; }
    size_t size() const { return items_.size() / sizeof(T); }

    T operator[](size_t index) const { return read<T>(items_, index * sizeof(T)); }

  private:
    bool exists_ = false;
    Bytes items_;
};

class Table;

/// A vector of tables. A missing one is empty.
class Tables {
  public:
    Tables() = default;
    Tables(Bytes buffer, uint64_t position)
        : buffer_(buffer), start_(position + sizeof(uint32_t)), offsets_(buffer, position) {}

    size_t size() const { return offsets_.size(); }

    /// Returns a table. A negative index becomes one that is too large.
    Table operator[](uint64_t index) const;

  private:
    Bytes buffer_;
    uint64_t start_ = 0;
    Vector<uint32_t> offsets_;
};

/// A table in a flatbuffer. Fields are numbered as in its schema, and a union takes two numbers.
class Table {
  public:
    Table(Bytes buffer, uint64_t position) : buffer_(buffer), position_(position) {
        fields_ = static_cast<uint64_t>(static_cast<int64_t>(position) - read<int32_t>(buffer, position));
        size_ = read<uint16_t>(buffer, fields_);
    }

    /// Returns the table at the start of a flatbuffer.
    static Table root(Bytes buffer) { return {buffer, read<uint32_t>(buffer, 0)}; }

    bool has(int field) const { return place(field) != 0; }

    template <typename T>
    T scalar(int field, T otherwise = {}) const {
        const uint64_t at = place(field);
        return at == 0 ? otherwise : read<T>(buffer_, at);
    }

    Table table(int field) const {
        require(has(field), "a table is missing");
        return {buffer_, target(field)};
    }

    template <typename T>
    Vector<T> vector(int field) const {
        return has(field) ? Vector<T>(buffer_, target(field)) : Vector<T>();
    }

    Tables tables(int field) const { return has(field) ? Tables(buffer_, target(field)) : Tables(); }

    Bytes bytes(int field) const {
        require(has(field), "a text or data is missing");
        const uint64_t at = target(field);
        return part(buffer_, at + sizeof(uint32_t), read<uint32_t>(buffer_, at));
    }

    std::string_view text(int field) const {
        const Bytes found = bytes(field);
        return {reinterpret_cast<const char*>(found.data()), found.size()};
    }

  private:
    uint64_t place(int field) const {
        const uint64_t entry = sizeof(uint16_t) * (2 + static_cast<uint64_t>(field));
        const uint16_t offset =
            entry + sizeof(uint16_t) <= size_ ? read<uint16_t>(buffer_, fields_ + entry) : uint16_t{0};
        return offset == 0 ? 0 : position_ + offset;
    }

    uint64_t target(int field) const { return place(field) + read<uint32_t>(buffer_, place(field)); }

    Bytes buffer_;
    uint64_t position_;
    uint64_t fields_;
    uint16_t size_;
};

inline Table Tables::operator[](uint64_t index) const {
    require(index < size(), "an index is out of range");
    return {buffer_, start_ + index * sizeof(uint32_t) + offsets_[index]};
}

}  // namespace llama_runner
