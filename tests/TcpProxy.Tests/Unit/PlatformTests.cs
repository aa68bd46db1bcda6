using System;
using System.Net;
using Xunit;

namespace TcpProxy.Tests;

public sealed class PlatformTests
{
    [Theory]
    [InlineData("500ms", 500)]
    [InlineData("5", 5000)]
    [InlineData("5s", 5000)]
    [InlineData("10m", 600_000)]
    [InlineData("1h", 3_600_000)]
    [InlineData("7d", 604_800_000)]
    [InlineData("0", 0)]
    [InlineData("off", 0)]
    public void Times(string text, long milliseconds)
    {
        Assert.Equal(milliseconds, Units.ParseTime(text).TotalMilliseconds);
        if (milliseconds > 0)
        {
            Assert.Equal(milliseconds, Units.ParseTime(Units.Text(Units.ParseTime(text))).TotalMilliseconds);
        }
    }

    [Theory]
    [InlineData("")]
    [InlineData("s")]
    [InlineData("5x")]
    [InlineData("-1")]
    [InlineData("1.5h")]
    [InlineData("1 s")]
    [InlineData("٣s")]
    [InlineData("99999999999999999999")]
    [InlineData("50d")] // more than the runtime's timers count
    [InlineData("OFF")]
    public void What_is_no_time(string text) => Assert.Throws<FormatException>(() => Units.ParseTime(text));

    [Theory]
    [InlineData("512", 512)]
    [InlineData("64k", 65536)]
    [InlineData("10M", 10 << 20)]
    [InlineData("1g", 1 << 30)]
    [InlineData("off", 0)]
    public void Sizes(string text, long bytes) => Assert.Equal(bytes, Units.ParseSize(text));

    [Theory]
    [InlineData("")]
    [InlineData("k")]
    [InlineData("1t")]
    [InlineData("-5")]
    [InlineData("99999999999g")]
    [InlineData("9223372036854775807")]
    public void What_is_no_size(string text) => Assert.Throws<FormatException>(() => Units.ParseSize(text));

    [Theory]
    [InlineData("8080", "", 8080, 8080, AddressKind.Loopback)]
    [InlineData("8000-8010", "", 8000, 8010, AddressKind.Loopback)]
    [InlineData("localhost:80", "localhost", 80, 80, AddressKind.Loopback)]
    [InlineData(":80", "", 80, 80, AddressKind.Tcp)]
    [InlineData("*:80", "", 80, 80, AddressKind.Tcp)]
    [InlineData("[::1]:80", "::1", 80, 80, AddressKind.Tcp)]
    [InlineData("[fe80::1%lo]:80", "fe80::1%lo", 80, 80, AddressKind.Tcp)]
    [InlineData("1.2.3.4:1-3", "1.2.3.4", 1, 3, AddressKind.Tcp)]
    [InlineData("host.example:0", "host.example", 0, 0, AddressKind.Tcp)]
    [InlineData("unix:/a b", "/a b", 0, 0, AddressKind.Unix)]
    [InlineData("fd:3", "3", 0, 0, AddressKind.Descriptor)]
    [InlineData("fd:web", "web", 0, 0, AddressKind.Descriptor)]
    public void Listen_addresses(string text, string host, int first, int last, object kind)
    {
        ListenAddress address = ListenAddress.Parse(text);
        Assert.Equal((kind, host, text), (address.Kind, address.Host, address.Text));
        Assert.Equal((first, last), (address.PortAt(0), address.PortAt(address.PortCount - 1)));
    }

    [Theory]
    [InlineData("80", "localhost", AddressKind.Tcp)]
    [InlineData("db:5432", "db", AddressKind.Tcp)]
    [InlineData("[2001:db8::1]:80", "2001:db8::1", AddressKind.Tcp)]
    [InlineData("echo:7", "echo", AddressKind.Tcp)]
    [InlineData("echo", "", AddressKind.Echo)]
    [InlineData("discard", "", AddressKind.Discard)]
    [InlineData("unix:x", "x", AddressKind.Unix)]
    public void Upstream_addresses(string text, string host, object kind)
    {
        UpstreamAddress address = UpstreamAddress.Parse(text);
        Assert.Equal((kind, host, text), (address.Kind, address.Host, address.Text));
    }

    [Theory]
    [InlineData("")]
    [InlineData(":")]
    [InlineData("a")]
    [InlineData("a:")]
    [InlineData("a:b")]
    [InlineData("a:65536")]
    [InlineData("a:-1")]
    [InlineData("a:5-1")]
    [InlineData("a:0-5")]
    [InlineData("a b:80")]
    [InlineData("a..b:80")]
    [InlineData("1.2.3:80")]
    [InlineData("1.2.3.256:80")]
    [InlineData("::1")]
    [InlineData("::1:80")]
    [InlineData("[::1]")]
    [InlineData("[::1:80")]
    [InlineData("[1.2.3.4]:80")]
    [InlineData("unix:")]
    [InlineData("fd:")]
    [InlineData("80 weight=3")]
    [InlineData("\0:80")]
    public void What_is_no_address(string text)
    {
        Assert.Throws<FormatException>(() => ListenAddress.Parse(text));
        Assert.Throws<FormatException>(() => UpstreamAddress.Parse(text));
    }

    [Fact]
    public void A_host_name_has_at_most_253_characters()
    {
        string longest = new('a', 253);
        Assert.Equal(longest, UpstreamAddress.Parse($"{longest}:80").Host);
        Assert.Throws<FormatException>(() => UpstreamAddress.Parse($"{longest}a:80"));
        Assert.Throws<FormatException>(() => ListenAddress.Parse($"{longest}a:80"));
    }

    [Theory]
    [InlineData("*:80")]
    [InlineData(":80")]
    [InlineData("a:0")]
    [InlineData("0")]
    public void What_can_be_listened_at_but_not_reached(string text)
    {
        Assert.NotNull(ListenAddress.Parse(text));
        Assert.Throws<FormatException>(() => UpstreamAddress.Parse(text));
    }

    [Theory]
    [InlineData("plain", "plain")]
    [InlineData("a\"b\\c", "a\\\"b\\\\c")]
    [InlineData("\r\n\t\0\u001b\u007f\u0085", "\\r\\n\\t\\u0000\\u001b\\u007f\\u0085")]
    [InlineData("żółć 字", "żółć 字")]
    public void What_comes_from_outside_is_escaped(string text, string escaped) =>
        Assert.Equal(escaped, Text.Escape(text));

    [Theory]
    [InlineData("lestconn", "leastconn")]
    [InlineData("idle-timeot", "idle-timeout")]
    [InlineData("idle", "idle-timeout")]
    [InlineData("x", null)]
    [InlineData("qwertyuiop", null)]
    public void What_was_probably_meant(string word, string? meant) =>
        Assert.Equal(meant, Text.Nearest(word, "leastconn", "idle-timeout", "once"));

    [Fact]
    public void An_address_in_the_log_is_written_as_people_write_it()
    {
        Assert.Equal("1.2.3.4:5", Text.Of(new IPEndPoint(IPAddress.Parse("::ffff:1.2.3.4"), 5)));
        Assert.Equal("[::1]:5", Text.Of(new IPEndPoint(IPAddress.IPv6Loopback, 5)));
        Assert.Equal("-", Text.Of((EndPoint?)null));
    }

    [Fact]
    public void A_time_in_the_log_is_that_of_RFC_3339() =>
        Assert.Equal("2026-01-02T03:04:05.006Z", Text.Of(new DateTime(2026, 1, 2, 3, 4, 5, 6, DateTimeKind.Utc)));
}
