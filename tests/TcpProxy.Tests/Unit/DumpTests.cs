using System;
using System.Buffers;
using System.Linq;
using System.Text;
using System.Text.RegularExpressions;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>The blocks of --dump; EndToEnd/DumpTests.cs compares them with socat's own.</summary>
public sealed class DumpTests
{
    private static readonly byte[] AllBytes = [.. Enumerable.Range(0, 256).Select(i => (byte)i)];

    [Fact]
    public void Text_shows_what_can_be_shown_and_escapes_what_moves_the_cursor()
    {
        string expected = ".......\\a\\b\t\n\\v\\f\\r.................."
            + " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
            + new string('.', 129) + "\n";
        Assert.Equal("> T  length=256 from=0 to=255\n" + expected, Show(AllBytes));
    }

    [Fact]
    public void Hex_shows_all_on_one_line()
    {
        string expected = string.Concat(AllBytes.Select(b => $" {b:x2}")) + "\n";
        Assert.Equal("< T  length=256 from=1000 to=1255\n" + expected, Show(AllBytes, 1000, isHex: true, mark: "<"));
    }

    [Theory]
    [InlineData("a line\n", "a line\n")]
    [InlineData("no end", "no end\n")]
    [InlineData("a\n\nb", "a\n\nb\n")]
    [InlineData("\n", "\n")]
    [InlineData("dos\r\n", "dos\\r\n")]
    [InlineData("\u001b[31m", ".[31m\n")]
    [InlineData("\u00e9", "..\n")]
    public void A_block_ends_with_its_last_line(string bytes, string shown) =>
        Assert.EndsWith($" to={7 + Encoding.UTF8.GetByteCount(bytes) - 1}\n{shown}", Show(Encoding.UTF8.GetBytes(bytes), 7), StringComparison.Ordinal);

    [Fact]
    public void Offsets_go_beyond_four_gigabytes() =>
        Assert.StartsWith("> T  length=2 from=5000000000 to=5000000001\n", Show("ab"u8, 5_000_000_000), StringComparison.Ordinal);

    [Fact]
    public void The_time_is_of_now_with_microseconds()
    {
        Match time = Regex.Match(Raw("x"u8), @"^> (\d{4})/(\d\d)/(\d\d) (\d\d):(\d\d):(\d\d)\.\d{6}  length=1 ");
        Assert.True(time.Success);
        int[] parts = [.. time.Groups.Values.Skip(1).Select(g => int.Parse(g.Value, null))];
        DateTime shown = new(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], DateTimeKind.Utc);
        Assert.InRange(DateTime.UtcNow - shown, TimeSpan.FromSeconds(-1), TimeSpan.FromSeconds(30));
    }

    [Fact]
    public void Colour_ends_with_the_block_and_a_note_has_none()
    {
        Assert.Equal("\u001b[36m> T  length=2 from=0 to=1\nhi\n\u001b[mnote\n", Show("hi"u8, mark: "\u001b[36m>", end: "note\n"));
        Assert.Equal("note\n", Show([], mark: ">", end: "note\n"));
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void Random_bytes_are_what_an_independent_formatting_says(int seed)
    {
        Random random = new(seed);
        byte[] bytes = new byte[random.Next(1, 70_000)];
        random.NextBytes(bytes);
        Assert.EndsWith("\n" + string.Join("", bytes.Select(b => $" {b:x2}")) + "\n", Show(bytes, isHex: true), StringComparison.Ordinal);
        string text = string.Concat(bytes.Select(b => (char)b switch
        {
            '\a' => "\\a",
            '\b' => "\\b",
            '\v' => "\\v",
            '\f' => "\\f",
            '\r' => "\\r",
            '\\' => "\\\\",
            '\t' or '\n' => $"{(char)b}",
            < ' ' or > '~' => ".",
            _ => $"{(char)b}",
        }));
        Assert.EndsWith("\n" + text.TrimEnd('\n') + "\n", Show(bytes).TrimEnd('\n') + "\n", StringComparison.Ordinal);
    }

    [Fact]
    public void The_options_make_one_tap_and_the_last_of_them_holds()
    {
        Assert.Empty(Taps("1 echo"));
        Assert.Empty(Taps("1 echo --dump text --dump off"));
        Assert.Equal(["dump"], Taps("1 echo --dump text --dump hex"));
        Assert.Equal(["record", "dump"], Taps("1 echo --dump text --record a --dump hex"));
        Assert.Equal(["dump", "record"], Taps("1 echo --record a --dump hex --record b"));
        RouteSettings[] routes =
        [
            .. CommandLine.Parse("--dump-limit 10 --dump text -l 1 -u echo --dump off -l 2 -u echo --dump-limit 20 -l 3 -u echo --dump hex".Split(' ')).Routes,
        ];
        Assert.Equal([0, 1, 1], routes.Select(r => r.Taps.Count));
        Assert.Equal([(0, 10), (1, 20), (2, 10)], routes.Select(r => (r.Dump.Format, (int)r.Dump.Limit)));
        Assert.All(routes[1..], r => Assert.Same(r.Dump, r.Taps[0]));
    }

    private static string[] Taps(string words) =>
        [.. CommandLine.Parse(words.Split(' ')).Routes[0].Taps.Select(tap => tap is DumpSettings ? "dump" : "record")];

    private static string Show(ReadOnlySpan<byte> bytes, long offset = 0, bool isHex = false, string mark = ">", string end = "") =>
        Regex.Replace(Raw(bytes, offset, isHex, mark, end), @"^(\S*[<>]) [\d/]{10} [\d:.]{15} ", "$1 T ");

    private static string Raw(ReadOnlySpan<byte> bytes, long offset = 0, bool isHex = false, string mark = ">", string end = "")
    {
        byte[] copy = ArrayPool<byte>.Shared.Rent(bytes.Length);
        bytes.CopyTo(copy);
        DumpBlock block = new(copy, bytes.Length, offset, isHex, mark, end);
        block.Stamp();
        LogText text = new(LogFormat.Text);
        block.Format(text);
        return Encoding.Latin1.GetString(text.Bytes);
    }
}
